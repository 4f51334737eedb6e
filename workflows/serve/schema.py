"""The request of POST /v1/chat/completions, the part of OpenAI's API that is served.

A field that would change the answer and is not served is an error when it asks for something and passes when it does
not (`"tools": []`). Fields unknown to both are ignored, as clients send many. Types are never converted: "0.5" is
not a number.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from workflows.serve.errors import ApiError, bad_request

LONGEST_STOP, MOST_LOGPROBS = 256, 20
# field -> values that ask for nothing; None always does.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class ImageUrl(_Form):
    """Where a picture is: a data: URI, or an address where the server fetches pictures."""

    url: str


class Part(_Form):
    """One part of a message: text or a picture."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _whole(self):
        if self.type not in ("text", "image_url"):
            text = f"parts of type {self.type!r} are not supported; send text and image_url parts"
            raise PydanticCustomError("unsupported", "{text}", {"text": text})
        if getattr(self, self.type) is None:
            text = f"a part of type {self.type} needs the field {self.type}"
            raise PydanticCustomError("missing", "{text}", {"text": text})
        return self


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("content_type", "content must be a string or a list of parts")
    return content


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class Message(_Form):
    """One message; text alone is one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]


class StreamOptions(_Form):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None


class ChatRequest(_Form):
    """A chat completion request. Without a temperature the answer is greedy."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]] | None, BeforeValidator(_as_list)
    ] = Field(None, max_length=4)
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        for name, neutral in _UNSUPPORTED.items() if isinstance(data, dict) else ():
            value = data.get(name)
            if value is not None and not any(type(value) is type(v) and value == v for v in neutral):
                text = f"{name} is not supported by this server; leave it out"
                raise PydanticCustomError("unsupported", "{text}", {"text": text, "param": name})
        return data

    @model_validator(mode="after")
    def _consistent(self):
        # 0 is what some clients send beside logprobs: false.
        if self.top_logprobs and not self.logprobs:
            text = "top_logprobs: set logprobs to true to get them"
            raise PydanticCustomError("unsupported", "{text}", {"text": text, "param": "top_logprobs"})
        if self.stream_options is not None and not self.stream:
            text = "stream_options: only for a request with stream set to true"
            raise PydanticCustomError("unsupported", "{text}", {"text": text, "param": "stream_options"})
        return self


def parse_request(body: bytes) -> ChatRequest:
    """A request from its body.

    Raises:
        ApiError: 400 naming the first field that is wrong.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
    raise _explain(first)


def _explain(error: Any) -> ApiError:
    if error["type"] == "json_invalid":
        return bad_request(f"the body is not JSON: {error['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json")
    param = error.get("ctx", {}).get("param") or _path(error["loc"])
    message = error["msg"] if error["type"] == "unsupported" else f"{param or 'the body'}: {error['msg']}"
    return bad_request(message, param, "unsupported" if error["type"] == "unsupported" else "invalid_value")


def _path(location: tuple[int | str, ...]) -> str | None:
    """("messages", 1, "content") -> messages[1].content"""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return path.removeprefix(".") or None
