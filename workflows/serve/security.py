"""API keys: who may use what lies under /v1."""

import hashlib
import hmac
from collections.abc import Iterable

from workflows.serve.errors import ApiError


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
