"""The HTTP interface, as an ASGI application around whatever model is served at the moment.

    POST /v1/chat/completions   OpenAI's chat completions, streamed or whole (schema.py says which part)
    GET  /v1/models             the served model and its version
    GET  /v1/models/{id}        the same by name, or by name/version
    GET  /healthz               200 while the process answers
    GET  /readyz                200 when a model is loaded and answers, else 503
    GET  /                      the playground: a page to try the model

Every response carries `x-model-version` (name/version of the registered model, or the folder's name) and, for a
registered model, `x-model-run-id` (the MLflow run that made it). With API keys, everything under /v1 needs one.
Prompts, images and answers are never logged.
"""

import asyncio
import base64
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from workflows.serve.openai import ApiError, model_entry
from workflows.serve.options import Limits
from workflows.serve.service import Served, Service, api_error

__all__ = ["Served", "Service", "build_app"]
_RECORD = "mlmamba.record"  # key of a request's Record in its ASGI scope


def build_app(service: Service) -> FastAPI:
    """The application. Needs no Ray: any ASGI server can run it."""
    app = FastAPI(title="mlmamba", docs_url=None, redoc_url=None, openapi_url=None)
    log = RequestLog() if service.access.log_requests else None
    bodies = Bodies(service.limits)

    def check(scope: dict) -> None:
        scope[_RECORD] = Record()
        if scope["path"].startswith("/v1"):
            service.keys.check(dict(scope["headers"]).get(b"authorization"))

    def headers(scope: dict) -> dict[str, str]:
        served = scope[_RECORD].served or service.served
        return {} if served is None else served.headers

    def ended(scope: dict, status: int, seconds: float) -> None:
        record = scope[_RECORD]
        served = record.served or service.served
        version = "" if served is None else served.source.label
        service.metrics.of_version(version).request(status, seconds)
        if log is not None:
            log.write(record, scope, status, seconds, version)

    app.add_middleware(Envelope, headers=headers, check=check, ended=ended)
    app.add_exception_handler(ApiError, lambda _, error: error_response(error))
    app.add_exception_handler(HTTPException, lambda request, error: error_response(_unrouted(request, error)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        record = request.scope[_RECORD]
        try:
            body = await bodies.read(request)
            try:
                conversation = await service.begin(body)
            finally:
                bodies.release(len(body))
                del body
            record.begin(conversation)
            if conversation.streams:
                return EventStream(conversation.events(), {}, conversation.cancel)
            return JSONResponse(await unless_disconnected(request, conversation.whole()))
        except Disconnected:
            return Response(status_code=499)  # nobody reads it
        except ApiError:
            raise
        except Exception as error:
            raise api_error(error) from error

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model_entry(service.loaded().source, service.since)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        served = service.loaded()
        if not served.is_called(name):
            raise ApiError(404, f"that model is not served here; ask for {served.id!r}", "model", "model_not_found")
        return JSONResponse(model_entry(served.source, service.since, name))

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        return JSONResponse({"status": "ready" if service.ready else "not ready"}, 200 if service.ready else 503)

    if service.access.playground:

        @app.get("/")
        async def playground() -> HTMLResponse:
            return HTMLResponse(HTML, headers={"content-security-policy": POLICY})

    return app


def _unrouted(request: Request, error: HTTPException) -> ApiError:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None)


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
        return ApiError(413, f"the body is over the limit of {limit:,} bytes; send smaller images", code="too_large")


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


if TYPE_CHECKING:
    from workflows.serve.service import Conversation, Served

LOGGER = "mlmamba.requests"
_PATHS = ("/", "/healthz", "/readyz", "/v1/models", "/v1/chat/completions")  # others could say anything
_QUIET = ("/healthz", "/readyz")  # asked every few seconds


@dataclass
class Record:
    """What is remembered about a request until its end."""

    conversation: "Conversation | None" = None

    @property
    def served(self) -> "Served | None":
        """The model that answers it, once that is decided."""
        return None if self.conversation is None else self.conversation.served

    def begin(self, conversation: "Conversation") -> None:
        """The request is in the queue."""
        self.conversation = conversation


class RequestLog:
    """Writes to the logger `mlmamba.requests`, which goes to stderr unless it was set up otherwise."""

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
        path = scope["path"] if scope["path"] in _PATHS else "other"
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
        "completion_tokens": sum(answer.completion_tokens for answer in answers),
        "finish_reason": first.finish_reason,
        "queue_seconds": round(first.timing.queued, 4),
        "first_token_seconds": round(first.timing.first_token, 4),
    }


HTML = Path(__file__).with_name("playground.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """CSP sources of the inline elements of one tag, by their content."""
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


POLICY = (
    f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
