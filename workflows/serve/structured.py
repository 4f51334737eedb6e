"""The form that a request gives its answers: JSON of a schema, any JSON object, or one of several words.

Its fields have the names that OpenAI and vLLM gave them. A form becomes the text of a grammar (grammar.py).
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from workflows.serve.grammar import Form, GrammarError

# What a person or a model may write between two tokens of JSON; without an end a small model writes it for ever.
_SPACE = r"[\x20\x0A\x0D\x09]{1,40}"
_OPTIONS = {"lenient": False, "coerce_one_of": False, "whitespace_flexible": True, "whitespace_pattern": _SPACE}
# Answers are stripped, so white space before them changes nothing; the model may be used to it.
_START = "start: SPACE? answer\nSPACE: /[ \\n]{1,2}/\n"


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


def _all_text(words: Any) -> Any:
    if isinstance(words, list) and not all(isinstance(word, str) for word in words):
        raise PydanticCustomError("words", "every word must be a valid string")  # once, whatever their number
    return words


Words = Annotated[list[str] | None, BeforeValidator(_all_text)]


class JsonSchema(_Fields):
    """A schema and its name, which only the client needs. Whatever `strict` says, the answer satisfies the schema."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Fields):
    """The form of the answer: any text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self):
        if self.type == "json_schema" and self.json_schema is None:
            text = "response_format: type json_schema needs the field json_schema"
            raise PydanticCustomError("unsupported", "{text}", {"text": text, "param": "response_format"})
        return self


class StructuredOutputs(_Fields):
    """The form of the answer, by the names that vLLM gave it; one of them."""

    choice: Words = None
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            if name not in ("choice", "json", "json_object") and value not in (None, False):
                text = f"structured_outputs.{name} is not supported by this server; it has choice, json and json_object"
                raise PydanticCustomError("unsupported", "{text}", {"text": text, "param": "structured_outputs"})
        return data


class Structured(_Fields):
    """The fields of a request that give its answers a form."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_choice: Words = None
    guided_json: dict[str, Any] | str | None = None

    @property
    def gives_form(self) -> bool:
        """Whether a field gives the answer a form."""
        return bool(self._asked())

    def form(self, most: int) -> "Form":
        """The form that is asked for.

        Args:
            most: bytes of a schema, or of the words to choose from.

        Raises:
            GrammarError: there are several, or it cannot be used.
        """
        (param, kind, value), *others = self._asked()
        if others:
            raise GrammarError(f"{param} and {others[0][0]} both give the answer a form; send one", others[0][0])
        return (choice_form if kind == "choice" else json_form)(value, param, most)

    def _asked(self) -> list[tuple[str, str, Any]]:
        """Field, kind and value of each form."""
        asked: list[tuple[str, str, Any]] = []  # field, kind, value
        if (given := self.response_format) is not None and given.type != "text":
            schema = {"type": "object"} if given.type == "json_object" else given.json_schema.schema_
            asked.append(("response_format", "json", schema))
        if (given := self.structured_outputs) is not None:
            asked.append(("structured_outputs.choice", "choice", given.choice))
            asked.append(("structured_outputs.json", "json", given.json_))
            asked.append(("structured_outputs.json_object", "json", {"type": "object"} if given.json_object else None))
        asked += [("guided_choice", "choice", self.guided_choice), ("guided_json", "json", self.guided_json)]
        return [one for one in asked if one[2] is not None]


def json_form(schema: Any, param: str, most: int) -> Form:
    """JSON that satisfies a schema (a dict, or its text).

    Raises:
        GrammarError: it is no schema, or is over `most` bytes.
    """
    if isinstance(schema, str):
        _check_size(len(schema), most, param)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"{param}: the schema is not JSON", param) from error
    if not isinstance(schema, dict):
        raise GrammarError(f"{param}: a schema is a JSON object", param)
    try:  # `x-guidance` are options of the grammar's compiler, which are not the client's
        text = json.dumps({**schema, "x-guidance": _OPTIONS}, allow_nan=False)
    except (ValueError, RecursionError) as error:  # NaN, or a number of more digits than Python writes
        raise GrammarError(f"{param}: the schema holds a number that cannot be used", param) from error
    _check_size(len(text) - len(json.dumps(_OPTIONS)), most, param)
    return Form(f"{_START}answer: %json {text}\n", param)


def choice_form(words: list[str], param: str, most: int) -> Form:
    """One of several words or texts.

    Raises:
        GrammarError: there is none, one cannot be answered, or they are over `most` bytes together.
    """
    if not words:
        raise GrammarError(f"{param}: give at least one word to choose from", param)
    _check_size(sum(len(word.encode()) + 1 for word in words), most, param)
    for word in words:
        if not word or word != word.strip():
            raise GrammarError(
                f"{param}: answers are stripped; {word[:40]!r} is empty or has white space outside", param
            )
    escaped = ("".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in word) for word in words)
    return Form(f"{_START}answer: WORDS\nWORDS: /({'|'.join(dict.fromkeys(escaped))})/\n", param)


def _check_size(size: int, most: int, param: str) -> None:
    if size > most:
        raise GrammarError(f"{param} has {size:,} bytes, over this server's limit of {most:,} (schema_bytes)", param)
