"""The HTTP interface, as an ASGI application around whatever model is served at the moment.

    POST /v1/chat/completions   OpenAI's chat completions (schema.py says which part)
    GET  /v1/models             the served model and its version
    GET  /healthz               200 while the process answers
    GET  /readyz                200 when a model is loaded and answers, else 503

Every response carries `x-model-version` (name/version of the registered model, or the folder's name) and, for a
registered model, `x-model-run-id` (the MLflow run that made it). Prompts, pictures and answers are never logged.
"""

import asyncio
import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from workflows.registry import ResolvedModel
from workflows.serve.engine import Engine, EngineClosed, QueueFull
from workflows.serve.errors import ApiError, bad_request, without_message
from workflows.serve.generation import Answer, Prompt, Settings
from workflows.serve.limits import Limits
from workflows.serve.messages import read_messages
from workflows.serve.schema import AnswerMessage, ChatRequest, ChatResponse, Choice, Message, Usage, parse_request

logger = logging.getLogger(__name__)
READERS = 2  # requests whose pictures are decoded at once; each may take picture_pixels x 3 bytes


@dataclass(frozen=True)
class Served:
    """A loaded model and where it came from."""

    engine: Engine
    source: ResolvedModel

    @property
    def id(self) -> str:
        """The name under which clients ask for it; stays the same from version to version."""
        return self.source.name or self.source.folder.name

    @property
    def headers(self) -> dict[str, str]:
        """What every response says about the model."""
        headers = {"x-model-version": quote(self.source.label)}
        return headers | ({"x-model-run-id": self.source.run_id} if self.source.run_id else {})

    def read(self, messages: list[Message]) -> Prompt:
        """Messages to a prompt. Raises ApiError."""
        turns, pictures = read_messages(messages, self.engine.limits, self.engine.max_pictures)
        try:
            return self.engine.prepare(turns, pictures)
        except ValueError as error:
            raise bad_request(str(error), "messages") from error

    async def answer(self, prompt: Prompt, settings: Settings) -> Answer:
        """The engine's answer. Raises ApiError."""
        try:
            return await asyncio.wrap_future(self.engine.submit(prompt, settings))
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from error
        except EngineClosed as error:
            raise ApiError(503, str(error), code="model_stopping", retry_after=1) from error


class Service:
    """What a replica serves. `served` is replaced as a whole; a request keeps the one that it began with."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.served: Served | None = None
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")

    @property
    def ready(self) -> bool:
        """Whether a model is loaded and answers."""
        return self.served is not None and self.served.engine.alive

    async def complete(self, body: bytes) -> ChatResponse:
        """Answer the body of a chat completion request. Raises ApiError."""
        served = self.loaded()
        request = parse_request(body)
        if request.model not in (None, served.id, served.source.label):
            raise ApiError(
                404, f"model {request.model!r} is not served here; ask for {served.id!r}", "model", "no_model"
            )
        settings = _settings(request, self.limits)
        prompt = await asyncio.get_running_loop().run_in_executor(self._readers, served.read, request.messages)
        return _response(served, await served.answer(prompt, settings))

    def loaded(self) -> Served:
        """The model. Raises ApiError (503) when there is none yet."""
        if self.served is None:
            raise ApiError(503, "the model is still being loaded; try again", code="model_loading", retry_after=5)
        return self.served


def build_app(service: Service) -> FastAPI:
    """The application. Needs no Ray: any ASGI server can run it."""
    app = FastAPI(title="mlmamba", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_ModelHeaders, service=service)
    app.add_exception_handler(ApiError, lambda _, error: _error(error))
    app.add_exception_handler(HTTPException, lambda request, error: _error(_unrouted(request, error)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> JSONResponse:
        body = await _read_body(request, service.limits.body_bytes)
        try:
            completion = await service.complete(body)
        except ApiError:
            raise
        except Exception as error:
            logger.error("a request failed: %s", without_message(error))
            raise ApiError(500, "the server failed to answer; its log says where", code="internal") from error
        return JSONResponse(completion.model_dump())

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        served = service.loaded()
        source = served.source
        entry = {"id": served.id, "object": "model", "created": 0, "owned_by": "mlmamba"}
        entry |= {"version": source.version, "run_id": source.run_id, "label": source.label}
        return JSONResponse({"object": "list", "data": [entry]})

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        return JSONResponse({"status": "ready" if service.ready else "not ready"}, 200 if service.ready else 503)

    return app


class _ModelHeaders:
    """ASGI middleware: the model's headers on every response, errors included."""

    def __init__(self, app, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope, receive, send) -> None:
        served = self._service.served

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start" and served is not None:
                pairs = [(name.encode(), value.encode()) for name, value in served.headers.items()]
                message = {**message, "headers": [*message.get("headers", []), *pairs]}
            await send(message)

        await self._app(scope, receive, send_with_headers)


async def _read_body(request: Request, limit: int) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise ApiError(
                413, f"the body is over the limit of {limit:,} bytes; send smaller pictures", code="too_large"
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _settings(request: ChatRequest, limits: Limits) -> Settings:
    field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked = getattr(request, field)
    if asked is not None and asked > limits.max_tokens:
        raise bad_request(f"{field} = {asked} is over this server's limit of {limits.max_tokens}", field)
    return Settings(
        max_tokens=asked or min(limits.default_tokens, limits.max_tokens),
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=tuple(request.stop or ()),
    )


def _response(served: Served, answer: Answer) -> ChatResponse:
    return ChatResponse(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=served.id,
        system_fingerprint=served.source.label,
        choices=[Choice(message=AnswerMessage(content=answer.text), finish_reason=answer.finish_reason)],
        usage=Usage(
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            total_tokens=answer.prompt_tokens + answer.completion_tokens,
        ),
    )


def _unrouted(request: Request, error: HTTPException) -> ApiError:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None)


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers())
