"""HTTP below the routes, as ASGI: reading bodies in bounds, streams of events, and what every response carries."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from workflows.serve.errors import ApiError
from workflows.serve.limits import Limits

SECURITY_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}


class Disconnected(Exception):
    """The client has gone."""


class Bodies:
    """Reads request bodies. All that are held at once are counted: each may be large, and many may come."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self.held = 0

    async def read(self, request: Request) -> bytes:
        """The body. `release` its length when it is no longer needed.

        Raises:
            ApiError: it is too large (413), comes too slowly (408), or there is no room for it now (429).
            Disconnected: the client left before its end.
        """
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._limits.body_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                await self._read(request, chunks)
        except TimeoutError as error:
            self.release(sum(map(len, chunks)))
            seconds = self._limits.body_seconds
            raise ApiError(408, f"the body did not arrive within {seconds:g} s", code="body_timeout") from error
        except BaseException:
            self.release(sum(map(len, chunks)))
            raise
        return b"".join(chunks)

    def release(self, size: int) -> None:
        """Count this many bytes as no longer held."""
        self.held -= size

    async def _read(self, request: Request, chunks: list[bytes]) -> None:
        size = 0
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._limits.body_bytes:
                raise self._too_large()
            if self.held + len(chunk) > self._limits.held_bytes:
                raise ApiError(429, "too many large requests at once; try again", code="bodies_full", retry_after=2)
            self.held += len(chunk)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return

    def _too_large(self) -> ApiError:
        limit = self._limits.body_bytes
        return ApiError(413, f"the body is over the limit of {limit:,} bytes; send smaller pictures", code="too_large")


async def unless_disconnected(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client leaves. The request's body must have been read.

    Raises:
        Disconnected: the client left first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of server-sent events, each a JSON value, closed by `[DONE]`; its source is closed if the client leaves.

    Args:
        events: the values; None for a comment, so that nobody takes the connection for dead. An ApiError that it raises
            becomes the last event, in the form of an error's body.
        headers: of the response.
        ended: called in the end, also where the client left before the first event was asked for.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any] | None, None],
        headers: dict[str, str],
        ended: Callable[[], None],
    ):
        self.status_code, self.background, self.body = 200, None, b""
        self.init_headers({**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._events, self._ended = events, ended

    async def __call__(self, scope, receive, send) -> None:
        """Send the stream."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_disconnected(Request(scope, receive), self._send(send))
        except (Disconnected, OSError):
            return
        finally:
            self._ended()

    async def _send(self, send) -> None:
        try:
            async for event in self._events:
                await _part(send, b": waiting\n\n" if event is None else _event(event))
        except ApiError as error:
            await _part(send, _event(error.body()))
        finally:
            await self._events.aclose()
        await _part(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


async def _part(send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


def error_response(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body(), error.status, headers=error.headers())


class Envelope:
    """ASGI middleware: headers on every response, errors included; access; and a call when the response has ended.

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
            await self._app(scope, receive, send_with_headers)
        finally:
            self._ended(scope, status, time.monotonic() - start)
