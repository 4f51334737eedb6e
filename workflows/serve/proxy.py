"""In Ray Serve's proxy: how many requests of one client are under way at once.

The proxy takes 2 to 4 ms of a core for a request before a replica sees it, also for one that is refused there, and
takes them in the order in which they come. A client that sends hundreds at once would keep everybody waiting for
seconds. What it sends beyond what the service could hold is answered here, for a third of that. A flood of a thousand
connections a second, each given up at once, is a matter for what stands before the service (cluster/serve/nginx.conf).

A proxy asks `middlewares` where Ray's environment has `VARIABLE`; `mlmamba serve` sets it for a Ray that it starts. No
other part of the service is imported, as a proxy needs none.
"""

import json
import os
from collections import Counter

from starlette.middleware import Middleware

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "workflows.serve.proxy:middlewares"
MOST_VARIABLE = "MLMAMBA_REQUESTS_AT_ONCE"
MOST = 96
"""Requests of one client where the environment says nothing: what one replica answers and lets wait by its defaults."""
_ALWAYS = ("/healthz", "/health", "/readyz")


def requests_at_once(environment: dict[str, str]) -> int:
    """The requests of one client that an environment allows; 0 is any number.

    Raises:
        ValueError: it is no such number.
    """
    given = environment.get(MOST_VARIABLE) or str(MOST)
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise ValueError(f"{MOST_VARIABLE} = {given}: give the requests of one client at once, or 0 for any number")
    return int(given)


def middlewares() -> list[Middleware]:
    """What Ray Serve puts before its proxy."""
    most = requests_at_once(dict(os.environ))
    return [Middleware(AtOnce, most=most)] if most else []


class AtOnce:
    """ASGI middleware: answers 429 to a client that has `most` requests under way. A client is an address with what it
    gives as its key; nobody looks here whether that is one. Whether the service is well may always be asked.

    Args:
        app: what answers.
        most: requests of one client, 1 or more.
    """

    def __init__(self, app, most: int = MOST):
        self._app, self._most = app, most
        self._under_way: Counter[tuple[str, bytes]] = Counter()

    async def __call__(self, scope, receive, send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] != "http" or scope["path"].endswith(_ALWAYS):
            await self._app(scope, receive, send)
            return
        client = (scope.get("client") or ("",))[0], dict(scope["headers"]).get(b"authorization", b"")
        if self._under_way[client] >= self._most:
            await _refuse(send, self._most)
            return
        self._under_way[client] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way[client] -= 1
            if not self._under_way[client]:
                del self._under_way[client]


async def _refuse(send, most: int) -> None:
    message = f"{most} requests of yours are under way; send the next when one of them is answered"
    error = {"message": message, "type": "rate_limit_error", "param": None, "code": "too_many_at_once"}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", b"1"),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})
