"""OpenAI's chat completions, the part that is served: errors, the request, and the response.

A field that would change the answer and is not served is an error when it asks for something and passes when it does
not (`"tools": []`). Fields unknown to both are ignored, as clients send many. Types are never converted: "0.5" is
not a number. A request's size is looked at before anything is built from it.
"""

import time
import traceback
import uuid
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from workflows.registry import ResolvedModel
from workflows.serve.options import Limits
from workflows.serve.sampling import Answer, Delta, TokenLogprob
from workflows.serve.structured import Structured


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    """What is wrong and what to do about it."""
    type: str
    """OpenAI's name for the kind of error."""
    param: str | None
    """The field of the request that is meant, such as `messages[1].content`."""
    code: str | None
    """Short stable name of the error."""


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: what is wrong and what to do about it.
        param: the field of the request that is meant, such as `messages[1].content`.
        code: short stable name of the error.
        retry_after: seconds after which to try again.
        extra: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        extra: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
        self.extra = extra or {}

    @property
    def type(self) -> str:
        """OpenAI's name for the kind of error, from the status."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict:
        """The response body."""
        detail = ErrorDetail(message=str(self), type=self.type, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()

    def headers(self) -> dict[str, str]:
        """Headers beside it."""
        retry = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**retry, **self.extra}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param, code)


def without_message(error: BaseException) -> str:
    """An error for the log: its type and where it was raised. Its message could repeat what was asked."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"


LONGEST_STOP, MOST_LOGPROBS = 256, 20
# Fields of OpenAI's and of other servers, whose clients send them here as well -> values that ask for nothing; None
# always does.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "stop_token_ids", "bad_words"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p", "min_tokens"), (0, 0.0)),
    **dict.fromkeys(("repetition_penalty", "typical_p", "best_of"), (1, 1.0)),
    **dict.fromkeys(("ignore_eos", "use_beam_search", "echo", "continue_final_message"), (False,)),
    **dict.fromkeys(("audio", "web_search_options", "chat_template", "guided_regex", "guided_grammar"), ()),
    "logit_bias": ({},),
    "top_k": (-1, 0),
    "add_generation_prompt": (True,),
    "modalities": (["text"],),
}


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Supported(_Form):
    """A request whose fields are refused where they ask for what is not served."""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        for name, neutral in _UNSUPPORTED.items() if isinstance(data, dict) else ():
            value = data.get(name)
            if value is not None and not any(type(value) is type(v) and value == v for v in neutral):
                text = f"{name} is not supported by this server; leave it out"
                raise PydanticCustomError("unsupported", "{text}", {"text": text, "param": name})
        return data


class ImageUrl(_Form):
    """Where an image is: a data: URI, or an address where the server fetches images."""

    url: str


class Part(_Form):
    """One part of a message: text or an image."""

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
    if content is None:  # as in an answer that was empty
        return []
    if not isinstance(content, list):
        raise PydanticCustomError("content_type", "content must be a string or a list of parts")
    return content


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class Message(_Form):
    """One message; text alone is one text part. Only the assistant's may be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], FailFast(), BeforeValidator(_as_parts)]


class StreamOptions(_Form):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None


class ChatRequest(Supported, Structured):
    """A chat completion request. Without a temperature the answer is greedy."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
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

    @property
    def shows_images(self) -> bool:
        """Whether there is an image to read."""
        return any(part.type == "image_url" for message in self.messages for part in message.content)

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


def add_request_schema(document: dict[str, Any]) -> dict[str, Any]:
    """Add the request's form to the components of an OpenAPI document, under its class's name; returns the document."""
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    document["components"]["schemas"] |= schema.pop("$defs") | {ChatRequest.__name__: schema}
    return document


Request = TypeVar("Request", bound=BaseModel)


def parse_request(body: bytes, limits: Limits | None = None, form: type[Request] = ChatRequest) -> Request:
    """A request from its body; `messages` among its fields are under limits.

    Raises:
        ApiError: 400 naming the first field that is wrong, or the limit that it is over.
    """
    limits = limits or Limits()
    # A comma stands in a text or between two values, of which a part has three. Two more limits are looked at where
    # nothing was escaped in an unusual way: pydantic would build a million parts before they can be counted.
    for what, mark, most in (
        ("values", b",", limits.text_bytes + 16 * limits.messages),
        ("messages", b'"role"', limits.messages),
        ("parts", b'"type"', limits.messages),
    ):
        if body.count(mark) > most:
            raise bad_request(f"the body has more than {most:,} {what}; send fewer", "messages", "too_long")
    try:
        request = form.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
    else:
        if messages := getattr(request, "messages", None):
            _check_lengths(messages, limits)
        return request
    raise _explain(first)


def _check_lengths(messages: list[Message], limits: Limits) -> None:
    counts = {"messages": len(messages), "parts": sum(len(message.content) for message in messages)}
    for what, count in counts.items():
        if count > limits.messages:
            message = f"the request has {count:,} {what}, at most {limits.messages:,} are read"
            raise bad_request(message, "messages", "too_long")
    size = sum(len(part.text.encode("utf-8", "replace")) for m in messages for part in m.content if part.text)
    if size > limits.text_bytes:
        raise bad_request(
            f"the messages have {size:,} bytes of text, over the limit of {limits.text_bytes:,}",
            "messages",
            "context_length_exceeded",
        )


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


_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI sends this


def model_id(source: ResolvedModel) -> str:
    """The name under which clients ask for a model; stays the same from version to version."""
    return source.name or source.folder.name


def model_entry(
    source: ResolvedModel, since: int, max_length: int, name: str, max_sequence: int | None = None
) -> dict[str, Any]:
    """An entry of /v1/models. `max_model_len` is the longest prompt in tokens, by the name that vLLM gave it.

    A model with attention has `max_sequence_len` too: most tokens of prompt and answer together.
    """
    entry = {"id": name, "object": "model", "created": since, "owned_by": "mlmamba"}
    entry |= {} if max_sequence is None else {"max_sequence_len": max_sequence}
    return entry | {
        "version": source.version,
        "run_id": source.run_id,
        "label": source.label,
        "max_model_len": max_length,
    }


class Completion:
    """One chat completion: what its response, or every event of its stream, has in common.

    Args:
        model: the name under which the model is served.
        label: name/version of the model that answers, which becomes `system_fingerprint`.
        reports: whether log probabilities were asked for.
    """

    def __init__(self, model: str, label: str, reports: bool):
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model, self._label, self._reports = model, label, reports

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """The response body. finish_reason is "stop" where the model or a stop string ended the answer, "length" where
        max_tokens did."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.logprobs or ()),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return self._common("chat.completion") | {"choices": choices, "usage": usage(answers)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first event of a choice."""
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, None)

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """An event with more of a choice."""
        return self._chunk(index, {"content": delta.text}, None, delta.logprobs)

    def closing(self, index: int, answer: Answer) -> dict[str, Any]:
        """The last event of a choice."""
        return self._chunk(index, {}, answer.finish_reason)

    def totals(self, answers: list[Answer]) -> dict[str, Any]:
        """The last event of a stream with `include_usage`."""
        return self._common("chat.completion.chunk") | {"choices": [], "usage": usage(answers)}

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None, reports: Iterable[TokenLogprob] = ()
    ) -> dict[str, Any]:
        logprobs = self._logprobs(reports) if reports else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._common("chat.completion.chunk") | {"choices": [choice]}

    def _common(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._label,
        }

    def _logprobs(self, reports: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self._reports:
            return None
        entries = []
        for report in reports:
            top = [_entry(data, logprob) for data, logprob in report.top]
            entries.append(_entry(report.data, report.logprob) | {"top_logprobs": top})
        return {"content": entries, "refusal": None}


def usage(answers: list[Answer]) -> dict[str, Any]:
    """Token counts of the answers to one prompt; an image counts with all its placeholders, an answer with its end, and
    as cached what of the prompt was not read because a state of it was kept."""
    prompt, made = answers[0].prompt_tokens, sum(answer.completion_tokens for answer in answers)
    details = {"prompt_tokens_details": {"cached_tokens": answers[0].cached_tokens}}
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made, **details}


def _entry(data: bytes, logprob: float) -> dict[str, Any]:
    token = data.decode("utf-8", "replace")
    return {"token": token, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(data)}
