"""The HTTP interface, as an ASGI application around whatever model is served at the moment.

    POST /v1/chat/completions   OpenAI's chat completions, streamed or whole (openai.py says which part)
    GET  /v1/models             the served model and its version
    GET  /v1/models/{id}        the same by name, or by name/version
    GET  /healthz, /health      200 while the process answers
    GET  /readyz                200 when a model is loaded and answers, else 503
    POST /tokenize, /detokenize a text or messages to the model's tokens, and back (tokens.py)
    GET  /metrics               measurements of the replica that answers, for Prometheus (metrics.py)
    GET  /version               the version of mlmamba
    GET  /openapi.json          this interface as an OpenAPI document
    GET  /                      the playground: a page to try the model
    GET  /example               of the playground: the question about an image that the version carries, if it does

Every response carries `x-model-version` (name/version of the registered model, or the folder's name) and, for a
registered model, `x-model-run-id` (the MLflow run that made it). With API keys, every path needs one except `/`,
`/healthz`, `/health`, `/readyz` and `/openapi.json` (`/metrics` needs one: `authorization` in Prometheus' settings).
Without keys, a request that a web page of another site sent is refused, unless `access.origins` names the site.
A body may be compressed with gzip (`Content-Encoding: gzip`); limits hold for what it becomes.
Prompts, images and answers are never logged.
"""

import asyncio
import base64
import functools
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response

from mlmamba import __version__
from mlmamba.conversation import clean
from mlmamba.image_files import format_of
from workflows.registry.register import Example
from workflows.runtime import FreedMemory
from workflows.serve.intake import GZIP, Bodies, content_encoding
from workflows.serve.openai import ApiError, ErrorBody, add_request_schema
from workflows.serve.service import Service, api_error
from workflows.serve.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from workflows.serve.transport import (
    Envelope,
    EventStream,
    Record,
    RequestLog,
    error_response,
    routed_path,
    unless_disconnected,
)

T = TypeVar("T")
_RECORD = "mlmamba.record"  # key of a request's Record in its ASGI scope
_REQUEST = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}}}
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def build_app(service: Service, root_path: str = "") -> FastAPI:
    """The application. Needs no Ray: any ASGI server can run it. `state.bodies` reads the bodies of further routes.

    Args:
        service: what answers.
        root_path: path under which a proxy offers it; requests may come with it or without.
    """
    app = FastAPI(title="mlmamba", docs_url=None, redoc_url=None, responses=_ERRORS)
    bodies = app.state.bodies = Bodies(service.limits)
    _add_envelope(app, service, root_path)
    app.add_exception_handler(ApiError, lambda _, error: error_response(error))
    app.add_exception_handler(HTTPException, lambda request, error: error_response(_unrouted(request, error)))

    described = app.openapi
    app.openapi = lambda: add_request_schema(described())

    # Bodies are read by hand: they are under limits of their own, and their errors have OpenAI's form.
    async def read(request: Request, work: Callable[..., Awaitable[T]], *args: Any) -> T:
        """The result of `work(body, client, *args)`, given up when the client leaves."""
        client = request.scope[_RECORD].client
        body = await bodies.read(request, encodings=GZIP)
        held = len(body)
        try:
            if content_encoding(request) in GZIP:
                body = await unless_disconnected(request, service.inflate(body, client))
                bodies.hold(len(body))
                held += len(body)
            return await unless_disconnected(request, work(body, client, *args))
        finally:
            bodies.release(held)

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": _REQUEST})
    @_told
    async def chat(request: Request) -> Response:
        """Answer the last user message of a conversation: whole, or as a stream of server-sent events."""
        conversation = request.scope[_RECORD].conversation = await read(request, service.begin)
        if conversation.streams:
            return EventStream(conversation.events(), {}, conversation.cancel)
        return JSONResponse(await unless_disconnected(request, conversation.whole()))

    @app.post("/tokenize")
    @_told
    async def tokens_of(request: Request) -> Response:
        """The tokens of a text, or of the prompt that messages become."""
        return JSONResponse(await read(request, service.read_tokens, TokenizeRequest, tokenize))

    @app.post("/detokenize")
    @_told
    async def text_of(request: Request) -> Response:
        """The text of tokens."""
        return JSONResponse(await read(request, service.read_tokens, DetokenizeRequest, detokenize))

    @app.get("/metrics")
    async def metrics() -> Response:
        """Measurements of this replica, in Prometheus' text format."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        """The served model and its version."""
        return JSONResponse({"object": "list", "data": [service.loaded().entry(service.since)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        """The served model by name, or by name/version."""
        if not name:
            return await models()
        served = service.loaded()
        if not served.is_called(name):
            raise ApiError(404, f"that model is not served here; ask for {served.id!r}", "model", "model_not_found")
        return JSONResponse(served.entry(service.since, name))

    @app.get("/health", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Answers while the process does."""
        return JSONResponse({"status": "alive"})

    @app.get("/version")
    async def version() -> JSONResponse:
        """The version of this program."""
        return JSONResponse({"version": __version__})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether a model is loaded and answers."""
        if not service.ready:
            return JSONResponse({"status": "not ready"}, 503)
        offers = service.access.playground and service.loaded().source.example is not None
        return JSONResponse({"status": "ready"}, headers={"x-model-example": "1"} if offers else None)

    if service.access.playground:

        @app.get("/", include_in_schema=False)
        async def playground() -> HTMLResponse:
            return HTMLResponse(HTML, headers={"content-security-policy": POLICY})

        @app.get("/example", include_in_schema=False)
        async def example() -> JSONResponse:
            """The question that registration stored with the version, for the page to offer."""
            folder = service.loaded().source.example
            if folder is None:
                raise ApiError(404, "the served version carries no example", code="not_found")
            try:
                stored = await asyncio.to_thread(Example.load, folder)
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise ApiError(404, "the version's example cannot be read", code="not_found") from error
            kind = (format_of(stored.image) or "png").lower().replace("mpo", "jpeg")
            image = f"data:image/{kind};base64,{base64.b64encode(stored.image).decode()}"
            return JSONResponse({"question": clean(stored.question), "image": image})

    return app


def _told(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The handler, its errors as the client is told them."""

    @functools.wraps(handler)
    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except ApiError:
            raise
        except Exception as error:
            raise api_error(error) from error

    return answer


def _add_envelope(app: FastAPI, service: Service, root_path: str) -> None:
    """Access before a request, headers on its response, a measurement and a line of the log after it."""
    log = RequestLog() if service.access.log_requests else None
    freed = FreedMemory()

    def check(scope: dict) -> None:
        scope["root_path"] = scope.get("root_path", "").rstrip("/") or root_path
        scope[_RECORD] = Record("")
        scope[_RECORD].client = service.gate.check(scope, routed_path(scope))

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
        freed.give_back_soon()

    app.add_middleware(Envelope, headers=headers, check=check, ended=ended)
    if service.access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.access.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "x-session-id"],
            expose_headers=["x-model-version", "x-model-run-id", "retry-after"],
        )


def _unrouted(request: Request, error: HTTPException) -> ApiError:
    message = f"{request.method} {routed_path(request.scope)}: {error.detail}"
    if error.status_code == 404:
        message += "; this server answers POST /v1/chat/completions, for text and images, and GET /v1/models"
    return ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None)


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
