"""Routes about the version that is served.

    GET  /v1/swap           which version this replica serves, wants, loads and refused; a key where keys are needed
    POST /webhooks/mlflow   MLflow says that an alias moved: look at it now. Only with MLMAMBA_WEBHOOK_SECRET

The webhook needs no API key, since MLflow sends none: it is signed with the secret (HMAC-SHA256 over delivery id, time
and body, as in MLflow's mlflow/webhooks/delivery.py). It says only when to look; what it names is not trusted. It
reaches one replica, which touches a file in the storage folder, and the others look within a second.
"""

import base64
import hashlib
import hmac
import time
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from workflows.serve.alias import Follower
from workflows.serve.openai import ApiError

SECRET_VARIABLE = "MLMAMBA_WEBHOOK_SECRET"
_SIZE = 64 * 1024  # bytes
_AGE = 300  # seconds between sending and arrival, by both clocks


def add_routes(app: FastAPI, follower: Follower, environment: Mapping[str, str]) -> None:
    """Add the routes to a replica's application."""

    @app.get("/v1/swap")
    async def swap() -> JSONResponse:
        return JSONResponse(follower.as_dict())

    secret = environment.get(SECRET_VARIABLE, "")
    if not secret or follower.watcher is None:
        return

    @app.post("/webhooks/mlflow")
    async def webhook(request: Request) -> JSONResponse:
        """MLflow says that an alias moved."""
        if not recent(request.headers, time.time()):
            raise ApiError(401, "the signature is missing or too old", code="bad_signature")
        body = await app.state.bodies.read(request, _SIZE)
        app.state.bodies.release(len(body))
        if not signed(request.headers, body, secret, time.time()):
            raise ApiError(401, "the signature is wrong", code="bad_signature")
        follower.watcher.tell_others()
        follower.watcher.wake()
        return JSONResponse({"status": "looking"})


def recent(headers: Mapping[str, str], now: float) -> bool:
    """Whether a webhook's headers hold a signature of not long ago: what is looked at before the body is read."""
    sent = headers.get("x-mlflow-timestamp", "")
    fresh = sent.isdecimal() and len(sent) <= 12 and abs(now - int(sent)) <= _AGE
    return fresh and bool(headers.get("x-mlflow-signature"))


def signed(headers: Mapping[str, str], body: bytes, secret: str, now: float) -> bool:
    """Whether a webhook was signed with the secret, not long ago.

    Args:
        headers: of the request, by lower-case name.
        now: seconds since 1970.
    """
    if not recent(headers, now):
        return False
    identity, sent = headers.get("x-mlflow-delivery-id", ""), headers["x-mlflow-timestamp"]
    digest = hmac.new(secret.encode(), f"{identity}.{sent}.".encode() + body, hashlib.sha256).digest()
    expected = "v1," + base64.b64encode(digest).decode()
    given = headers.get("x-mlflow-signature", "")
    return hmac.compare_digest(given.encode(), expected.encode())
