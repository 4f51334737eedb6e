"""The HTTP interface, as an ASGI application around whatever model is served at the moment.

    POST /v1/chat/completions   OpenAI's chat completions, streamed or whole (schema.py says which part)
    GET  /v1/models             the served model and its version
    GET  /v1/models/{id}        the same by name, or by name/version
    GET  /healthz               200 while the process answers
    GET  /readyz                200 when a model is loaded and answers, else 503
    GET  /                      the playground: a page to try the model

Every response carries `x-model-version` (name/version of the registered model, or the folder's name) and, for a
registered model, `x-model-run-id` (the MLflow run that made it). With API keys, everything under /v1 needs one.
Prompts, pictures and answers are never logged.
"""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from workflows.serve.errors import ApiError
from workflows.serve.playground import page
from workflows.serve.request_log import Record, RequestLog
from workflows.serve.responses import model_entry
from workflows.serve.service import Served, Service, api_error
from workflows.serve.transport import Bodies, Disconnected, Envelope, EventStream, error_response, unless_disconnected

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
            return HTMLResponse(page.HTML, headers={"content-security-policy": page.POLICY})

    return app


def _unrouted(request: Request, error: HTTPException) -> ApiError:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None)
