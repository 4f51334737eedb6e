"""A client in the standard library's means, for tests: one question, with or without an image; and retries."""

import base64
import json
import mimetypes
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar


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
        image: an image's file or its encoded bytes.
        api_key: for a service that asks for one.
        options: further fields of the request, such as max_tokens.

    Raises:
        ServiceError: the service refused or failed.
        OSError: there is no service there, or the image's file cannot be read.
    """
    parts: list[dict] = [{"type": "text", "text": question}]
    if image is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": data_uri(image)}})
    body = {"messages": [{"role": "user", "content": parts}], **options}
    reply = request(url, "/v1/chat/completions", body, api_key=api_key)
    return reply["choices"][0]["message"]["content"]


def data_uri(image: str | Path | bytes) -> str:
    """An image as a data: URI. The service recognises the format from the data, whatever the type says."""
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


T = TypeVar("T")
_AGAIN = (408, 429, 500, 502, 503)  # not 504: what took too long would take too long again
_LONGEST = 10.0  # seconds between two tries


def ask_again(call: Callable[[], T], patience: float = 120, on_retry: Callable[[Exception], None] | None = None) -> T:
    """The result of `call`, tried again while the service cannot answer.

    Args:
        call: asks once; raises ServiceError, or OSError or HTTPException when the connection fails.
        patience: seconds after which the last error is raised.
        on_retry: told about each error that is tried again.

    Raises:
        ServiceError, OSError, HTTPException: an error that asking again does not mend, or patience has run out.
    """
    end = time.monotonic() + patience
    pause = 0.1
    while True:
        try:
            return call()
        except (ServiceError, OSError, HTTPException) as error:
            mends = not isinstance(error, ServiceError) or error.status in _AGAIN
            wait = random.uniform(0.5, 1) * pause
            if not mends or time.monotonic() + wait > end:
                raise
            if on_retry is not None:
                on_retry(error)
        time.sleep(wait)
        pause = min(2 * pause, _LONGEST)


def request_again(url: str, path: str, body: Any = None, patience: float = 120, timeout: float = 300) -> dict:
    """`request` of tests/helpers/serve_client.py, patiently."""
    return ask_again(lambda: request(url, path, body, timeout), patience)
