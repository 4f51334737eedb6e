"""A client in the standard library's means: one question, with or without a picture."""

import base64
import json
import mimetypes
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


class ServiceError(Exception):
    """The service answered with an error. `status` is the HTTP status, `code` the short name from the body."""

    def __init__(self, status: int, message: str, code: str | None):
        super().__init__(message)
        self.status, self.code = status, code


def ask(
    url: str, question: str, image: str | Path | bytes | None = None, *, api_key: str | None = None, **options: Any
) -> str:
    """Ask one question and return the answer.

    Args:
        url: the service, such as http://127.0.0.1:8000.
        question: the text.
        image: a picture's file or its encoded bytes.
        api_key: for a service that asks for one.
        options: further fields of the request, such as max_tokens.

    Raises:
        ServiceError: the service refused or failed.
        OSError: there is no service there, or the picture's file cannot be read.
    """
    parts: list[dict] = [{"type": "text", "text": question}]
    if image is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": data_uri(image)}})
    body = {"messages": [{"role": "user", "content": parts}], **options}
    reply = request(url, "/v1/chat/completions", body, api_key=api_key)
    return reply["choices"][0]["message"]["content"]


def data_uri(image: str | Path | bytes) -> str:
    """A picture as a data: URI. The service recognises the format from the data, whatever the type says."""
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    kind = None if isinstance(image, bytes) else mimetypes.guess_type(image)[0]
    return f"data:{kind or 'image/png'};base64,{base64.b64encode(data).decode()}"


def request(url: str, path: str, body: Any = None, timeout: float = 300, api_key: str | None = None) -> dict:
    """GET, or POST with a body, one path and return the JSON. Raises as `ask` does."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    call = urllib.request.Request(url.rstrip("/") + path, data, headers)
    try:
        with urllib.request.urlopen(call, timeout=timeout) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise _service_error(error) from None


def _service_error(error: urllib.error.HTTPError) -> ServiceError:
    text = error.read().decode(errors="replace")
    try:
        content = json.loads(text)["error"]
        return ServiceError(error.code, content["message"], content["code"])
    except (ValueError, KeyError, TypeError):
        return ServiceError(error.code, text[:500] or error.reason, None)
