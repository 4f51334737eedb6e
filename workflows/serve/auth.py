"""Who may ask, and which images may be fetched. Keys themselves are never part of a config."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator

from pipelines.config import StrictModel
from workflows.serve.openai import ApiError
from workflows.serve.remote_images import UrlPattern

KEYS_VARIABLE = "MLMAMBA_API_KEYS"


class Access(StrictModel):
    """Access to a service. Without keys everyone who reaches it may ask."""

    model_config = ConfigDict(frozen=True)

    api_keys_file: str | None = None
    """File with one API key a line (`#` begins a comment), readable where the replica runs. Keys are also read from the
    environment variable MLMAMBA_API_KEYS, separated by commas."""
    image_urls: tuple[str, ...] = ()
    """Addresses from which images may be fetched, such as https://images.example.com/shared/* (the host may begin
    with `*.`, the path may hold `*`). None by default. Private, loopback and link-local addresses never are."""
    hosts: tuple[str, ...] = ()
    """Names under which the service may be asked for (the Host header, without its port); any by default. `mlmamba
    serve` sets it to this machine's own names where no API keys are needed, so that no web page reaches the service
    through a name of its own."""
    origins: tuple[str, ...] = ()
    """Sites whose pages may ask from a browser (CORS), such as https://chat.example.com; none by default, and the
    playground, which is of this server's own, needs none. `*` lets all of them ask: only where there are API keys."""
    log_requests: bool = True
    """Write one line of JSON for each request, without what was asked or answered."""
    playground: bool = Field(True)
    """Serve the page at /, for people."""

    @field_validator("image_urls")
    @classmethod
    def _readable(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            UrlPattern.parse(pattern)
        return patterns

    @field_validator("origins")
    @classmethod
    def _sites(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@]+", origin):
                raise ValueError(
                    f"{origin!r} is no site; write https://HOST or https://HOST:PORT, without a path, or *"
                )
        return origins

    def keys(self, environment: dict[str, str]) -> list[str]:
        """The API keys, from the file and from the environment variable; none where neither is set.

        Raises:
            ValueError: the file cannot be read, or it or the variable is set and holds no key.
        """
        keys: list[str] = []
        if self.api_keys_file is not None:
            try:
                lines = Path(self.api_keys_file).read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not text"
                raise ValueError(f"api_keys_file: cannot read {self.api_keys_file} ({reason})") from error
            found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
            if not found:
                raise ValueError(f"api_keys_file: {self.api_keys_file} holds no key; write one a line")
            keys += found
        if KEYS_VARIABLE in environment:
            found = [key.strip() for key in environment[KEYS_VARIABLE].split(",") if key.strip()]
            if not found:
                raise ValueError(f"{KEYS_VARIABLE} is set and holds no key; unset it or give keys separated by commas")
            keys += found
        return keys


OPEN = ("/", "/healthz", "/health", "/readyz", "/openapi.json", "/webhooks/mlflow")
"""Paths that need no API key: what tells nothing, and the webhook, which is signed. Every other path needs one."""


class Gate:
    """Who may ask.

    Without keys everyone who reaches the service may. A web page must not, in the name of whoever looks at it: a
    request of another site's page is refused, as is a body that a page can send without asking first (anything but
    JSON). Of keys only digests are kept, and a given one is compared with all of them in constant time.
    """

    def __init__(self, keys: Iterable[str] = (), hosts: Iterable[str] = (), origins: Iterable[str] = ()):
        self._digests = [_digest(key.encode()) for key in keys]
        self._origins = frozenset(origin.encode() for origin in origins)
        if not self._digests and b"*" in self._origins:
            raise ValueError("access.origins: * lets every web page ask, so API keys are needed; name the sites")
        self._hosts = frozenset(host.lower() for host in hosts)

    @property
    def has_keys(self) -> bool:
        """Whether API keys are asked for."""
        return bool(self._digests)

    def check(self, scope: dict, path: str) -> str:
        """Accept a request and name its client: by its key, or by its address where it needs none.

        Args:
            scope: the ASGI scope.
            path: as the routes see it, without the prefix of a mounted application.

        Raises:
            ApiError: 401, 403, 415 or 421.
        """
        headers = dict(scope["headers"])
        address = (scope.get("client") or ("unknown",))[0]
        self._check_host(headers)
        if path in OPEN:
            return address
        if self._digests:
            return self._check_key(headers.get(b"authorization"))
        _check_page(scope["method"], headers, self._origins)
        return address

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if self._hosts and _host(headers.get(b"host", b"")) not in self._hosts:
            message = "this service is not asked for under that name; use " + " or ".join(sorted(self._hosts))
            raise ApiError(421, message, code="wrong_host")

    def _check_key(self, authorization: bytes | None) -> str:
        if authorization is None:
            raise _unauthorized("this server needs an API key; send it as `Authorization: Bearer KEY`", "no_api_key")
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(given, known)
        if scheme.lower() != b"bearer" or not found:
            raise _unauthorized("the API key is not one of this server's", "invalid_api_key")
        return given.hex()


def _check_page(method: str, headers: dict[bytes, bytes], allowed: frozenset[bytes]) -> None:
    """Refuse what a page of another site can send without the browser asking the service first."""
    origin, own = headers.get(b"origin"), headers.get(b"host", b"").lower()
    if origin is not None and origin not in allowed and origin.partition(b"://")[2].lower() != own:
        message = "a service without API keys answers no page of another site; access.origins names those that may ask"
        raise ApiError(403, message, code="foreign_origin")
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if method == "POST" and kind != b"application/json":
        raise ApiError(415, "send the header `Content-Type: application/json`", code="not_json")


def _host(value: bytes) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{value.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _unauthorized(message: str, code: str) -> ApiError:
    return ApiError(401, message, code=code, extra={"WWW-Authenticate": "Bearer"})
