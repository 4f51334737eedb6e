"""Between the routes and the wire: answers as streams, clients that leave, and what every response has in common: its
headers, and a line of the log.

FastAPI encodes the events (fastapi.sse). It and Starlette notice that a client has left only when something is sent, so
a question that waits in the queue would be computed for nobody; `unless_disconnected` listens meanwhile.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from workflows.serve.openai import ApiError

if TYPE_CHECKING:
    from workflows.serve.service import Conversation, Served

SECURITY_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}


async def unless_disconnected(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client leaves. The request's body must have been read.

    Raises:
        ClientDisconnect: the client left first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(EventSourceResponse):
    """A stream of server-sent events, each a JSON value, closed by `[DONE]`; its source is closed if the client leaves.

    Args:
        events: the values; None for a comment, so that nobody takes the connection for dead. An ApiError that it raises
            becomes the last event, in the form of an error's body.
        headers: of the response.
        ended: called in the end, also where the client left before the first event was asked for.
    """

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any] | None, None],
        headers: dict[str, str],
        ended: Callable[[], None],
    ):
        super().__init__(_encoded(events), headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        self._ended = ended

    async def __call__(self, scope, receive, send) -> None:
        """Send the stream."""
        try:
            await unless_disconnected(Request(scope, receive), self.stream_response(send))
        except (ClientDisconnect, OSError):
            return
        finally:
            await self.body_iterator.aclose()
            self._ended()


async def _encoded(events: AsyncGenerator[dict[str, Any] | None, None]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield format_sse_event(comment="waiting") if event is None else _event(event)
    except ApiError as error:
        yield _event(error.body())
    finally:
        await events.aclose()
    yield format_sse_event(data_str="[DONE]")


def _event(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return format_sse_event(data_str=text.encode("utf-8", "replace").decode())  # a lone surrogate has no UTF-8


def error_response(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body(), error.status, headers=error.headers())


class Envelope:
    """ASGI middleware: headers on every response, errors included; access; and a call when the response has ended.
    HEAD is answered as GET.

    Args:
        app: what answers.
        headers: of every response of a request (its ASGI scope), asked when the response starts.
        check: raises ApiError where a request (its scope) may not go on.
        ended: told the scope, the status (499 where the client left before an answer) and the seconds.
    """

    def __init__(
        self,
        app,
        headers: Callable[[dict], dict[str, str]],
        check: Callable[[dict], None],
        ended: Callable[[dict, int, float], None],
    ):
        self._app, self._headers, self._check, self._ended = app, headers, check, ended

    async def __call__(self, scope, receive, send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 499

        async def send_with_headers(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                known = {name for name, _ in message.get("headers", [])}
                extra = {**SECURITY_HEADERS, **self._headers(scope)}
                pairs = [(name.encode(), value.encode()) for name, value in extra.items()]
                pairs = [pair for pair in pairs if pair[0] not in known]
                message = {**message, "headers": [*message.get("headers", []), *pairs]}
            await send(message)

        try:
            try:
                self._check(scope)
            except ApiError as error:
                await error_response(error)(scope, receive, send_with_headers)
                return
            # Whoever serves this leaves out the body of an answer to HEAD.
            routed = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(routed, receive, send_with_headers)
        finally:
            self._ended(scope, status, time.monotonic() - start)


def routed_path(scope: dict) -> str:
    """The path as the routes see it: without the prefix under which the application is mounted (`route_prefix`)."""
    root, path = scope.get("root_path", "").rstrip("/"), scope["path"]
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


LOGGER = "mlmamba.requests"
_QUIET = ("/healthz", "/health", "/readyz", "/metrics")  # asked every few seconds
_PATHS = (
    *_QUIET,
    *("/", "/openapi.json", "/version", "/v1/models", "/v1/chat/completions", "/tokenize", "/detokenize"),
    "/webhooks/mlflow",
)
"""Paths that are written down; others could say anything."""


@dataclass
class Record:
    """What is remembered about a request until its end."""

    client: str
    """Whose turn it is when several wait: a digest of the API key, or the address where there are no keys."""
    conversation: "Conversation | None" = None

    @property
    def served(self) -> "Served | None":
        """The model that answers it, once that is decided."""
        return None if self.conversation is None else self.conversation.served


class RequestLog:
    """One line of JSON for each request, without what was asked or answered.

    It goes to the logger `mlmamba.requests`, which is stderr unless it was set up otherwise.
    """

    def __init__(self):
        self._logger = logging.getLogger(LOGGER)
        if not self._logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(message)s"))
            self._logger.addHandler(handler)
            self._logger.propagate = False
            self._logger.setLevel(logging.INFO)

    def write(self, record: Record, scope: dict, status: int, seconds: float, version: str) -> None:
        """Write a request's line. `status` is 499 where the client left before an answer."""
        path = routed_path(scope)
        path = path if path in _PATHS else "other"
        if path in _QUIET and status == 200:
            return
        line = {
            "time": round(time.time(), 3),
            "event": "request",
            "method": scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other",
            "path": path,
            "status": status,
            "seconds": round(seconds, 4),
            "version": version,
        }
        if record.conversation is not None:
            line |= _details(record.conversation)
        self._logger.info(json.dumps(line))


def _details(conversation: "Conversation") -> dict:
    answers = conversation.answers
    details = {"id": conversation.id, "stream": conversation.streams, "images": conversation.images}
    if not answers:
        return details | {"finish_reason": None}
    first = answers[0]
    return details | {
        "prompt_tokens": first.prompt_tokens,
        "cached_tokens": first.cached_tokens,
        "completion_tokens": sum(answer.completion_tokens for answer in answers),
        "finish_reason": first.finish_reason,
        "queue_seconds": round(first.timing.queued, 4),
        "first_token_seconds": round(first.timing.first_token, 4),
    }
