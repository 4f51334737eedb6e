"""Who may ask, and which images may be fetched. Keys themselves are never part of a config."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

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


class Keys:
    """The accepted API keys. Without any, every request is accepted.

    Only digests are kept, and a key is compared with all of them in constant time.
    """

    def __init__(self, keys: Iterable[str] = ()):
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: bytes | None) -> None:
        """Accept the value of an Authorization header, or raise ApiError (401)."""
        if not self._digests:
            return
        if authorization is None:
            raise _unauthorized("this server needs an API key; send it as `Authorization: Bearer KEY`", "no_api_key")
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(given, known)
        if scheme.lower() != b"bearer" or not found:
            raise _unauthorized("the API key is not one of this server's", "invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _unauthorized(message: str, code: str) -> ApiError:
    return ApiError(401, message, code=code, extra={"WWW-Authenticate": "Bearer"})
