"""Tables of pydantic models: every field with its type, limits, default and the string under it."""

import inspect
import json
import re
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "anything"}
_LIMITS = {
    "gt": "more than {}",
    "ge": "at least {}",
    "lt": "less than {}",
    "le": "at most {}",
    "pattern": "matches `{}`",
}


def section(model: type[BaseModel], note: str = "") -> str:
    """Heading, note, docstring and fields of a model. Fields of a base are left to the base's own section."""
    parents = bases(model)
    inherited = {name for parent in parents for name in parent.model_fields}
    head = ["field", "type", "default", "meaning"]
    rows = [
        [code(field.alias or name), type_text(field), default_text(field), field.description or ""]
        for name, field in model.model_fields.items()
        if name not in inherited
    ]
    if not any(row[-1] for row in rows):  # a public format, explained elsewhere
        head, rows = head[:-1], [row[:-1] for row in rows]
    parts = [f"## {model.__name__}", note, prose(model.__doc__)]
    if rows:
        parts.append(table(head, rows))
    if parents:
        parts.append(f"And the fields of {' and '.join(link(parent.__name__) for parent in parents)}.")
    return "\n\n".join(part for part in parts if part)


def bases(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The models that a model takes fields from, nearest first."""
    return [base for base in model.__mro__[1:] if issubclass(base, BaseModel) and base.model_fields]


def reachable(model: type[BaseModel]) -> dict[type[BaseModel], list[str]]:
    """Every model within a model, itself first, each with the key paths where it stands; bases before their users."""
    places: dict[type[BaseModel], list[str]] = {}

    def visit(current: type[BaseModel], path: str) -> None:
        for base in bases(current):
            places.setdefault(base, [])
        places.setdefault(current, [])
        if path:
            places[current].append(path)
        if len(places[current]) > 1:
            return  # its parts are known from the first place
        for name, field in current.model_fields.items():
            for inner, marks in _models(field.annotation):
                visit(inner, f"{path}.{name}{marks}".removeprefix("."))

    visit(model, "")
    return places


def type_text(field: FieldInfo) -> str:
    """The type and its limits in words."""
    limits = []
    for item in field.metadata:
        for name, text in _LIMITS.items():
            if (limit := getattr(item, name, None)) is not None:
                limits.append(text.format(f"{limit:,}" if isinstance(limit, int) else limit))
        least, most = getattr(item, "min_length", None), getattr(item, "max_length", None)
        limits += [f"{least} or longer"] if least is not None else []
        limits += [f"{most} or shorter"] if most is not None else []
    return ", ".join([_words(field.annotation), *limits])


def default_text(field: FieldInfo) -> str:
    """The default, or that there is none."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its own defaults"
    return "none" if value is None else code(value or json.dumps(value))


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(code(value) for value in arguments) if len(arguments) > 1 else code(arguments[0])
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        common = _common_base(kinds) if len(kinds) > 1 else None
        return f"any {link(common.__name__)}" if common else " or ".join(map(_words, kinds))
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {_words(arguments[0])} to {_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return link(annotation.__name__)
    return code(getattr(annotation, "__name__", str(annotation)))


def _common_base(kinds: list[Any]) -> type[BaseModel] | None:
    """The model that all the kinds take fields from: it has a section, which names them."""
    if not all(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
        return None
    return next((base for base in bases(kinds[0]) if all(issubclass(kind, base) for kind in kinds)), None)


def _models(annotation: Any, marks: str = "") -> list[tuple[type[BaseModel], str]]:
    """The models in an annotation, with [] for each list around them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, marks)]
    marks += "[]" if typing.get_origin(annotation) is list else ""
    return [found for argument in typing.get_args(annotation) for found in _models(argument, marks)]


GENERATED = "<!-- Generated by `python -m docs.generate`. Change the code it names, not this page. -->"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; pipes and line ends within cells are made harmless."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def code(value: Any) -> str:
    """A value as it stands in a recipe, in code marks."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def prose(docstring: str | None) -> str:
    """A docstring without its indentation; indented blocks stay what they are."""
    return inspect.cleandoc(docstring or "").strip()


def anchor(heading: str) -> str:
    """The anchor of a heading, by GitHub's rules: lower case, spaces to hyphens, no other punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def link(heading: str) -> str:
    """A link to a heading of the same page."""
    return f"[{heading}](#{anchor(heading)})"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
