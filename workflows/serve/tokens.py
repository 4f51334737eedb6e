"""What a text is in the model's tokens, by the routes and fields that vLLM gave them.

    POST /tokenize     {"prompt": TEXT} or {"messages": [...]} to {"tokens": [...], "count": N, "max_model_len": M}
    POST /detokenize   {"tokens": [...]} to {"prompt": TEXT}

Messages are tokenized as a chat completion would, each image as its placeholders; no image is decoded for it.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from workflows.serve.messages import read_messages
from workflows.serve.openai import Message, Supported, bad_request
from workflows.serve.options import Limits
from workflows.serve.service import Served


class TokenizeRequest(Supported):
    """A text, or the messages of a chat completion."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], FailFast()] = Field([])
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self):
        if (self.prompt is None) == (not self.messages):
            text = "give either prompt, a text, or messages"
            raise PydanticCustomError("unsupported", "{text}", {"text": text, "param": "prompt"})
        return self


def _integers(tokens: Any) -> Any:
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise PydanticCustomError("tokens", "give a list of token ids, which are whole numbers")  # once for all of them
    return tokens


class DetokenizeRequest(Supported):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[int], BeforeValidator(_integers)]


def tokenize(served: Served, request: TokenizeRequest, limits: Limits) -> dict[str, Any]:
    """The response body. Raises ApiError."""
    tokenizer = served.engine.tokenizer
    if request.messages:
        turns, images = read_messages(request.messages, limits, limits.images)
        ids = served.prompted(served.engine.prompt_ids, turns, images)
    else:
        size = len(request.prompt.encode("utf-8", "replace"))
        if size > limits.text_bytes:
            message = f"prompt has {size:,} bytes of text, over the limit of {limits.text_bytes:,}"
            raise bad_request(message, "prompt", "context_length_exceeded")
        special = request.add_special_tokens is not False
        ids = tokenizer(request.prompt, add_special_tokens=special)["input_ids"]
    strings = tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": served.engine.max_length, "tokens": ids, "token_strs": strings}


def detokenize(served: Served, request: DetokenizeRequest, limits: Limits) -> dict[str, Any]:
    """The response body. Raises ApiError."""
    tokenizer = served.engine.tokenizer
    for place, token in enumerate(request.tokens):
        if not 0 <= token < len(tokenizer):
            message = f"tokens[{place}] = {token} is none of the model's {len(tokenizer):,}"
            raise bad_request(message, f"tokens[{place}]", "invalid_value")
    return {"prompt": tokenizer.decode(request.tokens, clean_up_tokenization_spaces=False)}
