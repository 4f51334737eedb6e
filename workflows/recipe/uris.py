"""Secrets in URIs: found wherever a recipe has text, so that they reach no database, record, job or message.

A recipe is stored with its run in MLflow, travels with a submitted job and is repeated in messages. What opens an
object store belongs in the environment, which none of these have.
"""

import re
from collections.abc import Iterator
from typing import Any

from workflows.errors import UsageError

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_NAMES_ALONE = ("abfs", "abfss", "wasb", "wasbs", "hdfs", "viewfs", "ssh", "sftp", "scp", "git+ssh", "svn+ssh")
"""Schemes where what stands before an @ names a container or a user, and is no secret without a password."""
_SECRET = re.compile(
    r"(?:^|_)(?:pass|passwd|password|pwd|secret|token|credentials?|key|keys|auth|authorization|sig|signature|sas|apikey)"
    r"(?:_|$)|^(?:aws|x)?(?:access|secret|account|api|private|client)_?(?:key|secret)(?:_?id)?$"
)


def secret_in(uri: str) -> str | None:
    """What secret a URI holds, in words, or None.

    A password or user before the host, and a query's or fragment's access_key, secret_key, token, signature and the
    like. A user alone is none where the scheme writes a container or a login there, nor gs://anonymous@bucket.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return None
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    name, colon, password = user.partition(":")
    if at and colon and password:
        return "a password before the host"
    if at and name and scheme.lower() not in _NAMES_ALONE and name != "anonymous":
        return "a user before the host"
    if not at and "@" in rest and re.search(r"^[^\[:]*:(?!\d*$)", authority):  # a key with a / in it, written as it is
        return "a password before the host"
    _, _, query = rest.partition("?")
    for option in re.split(r"[?&;#]", query or rest.partition("#")[2]):
        name, _, value = option.partition("=")
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
        if value and _SECRET.search(words):
            return f"a value for {name}"
    return None


def without_secrets(text: str) -> str:
    """A text for messages, in which of each URI with a secret only its scheme, host and path are left."""
    return _URI.sub(lambda match: _bare(match[0]) if secret_in(match[0]) else match[0], text)


def refuse_secrets(text: str, place: str) -> None:
    """Raise UsageError that names the place, the kind of secret and the remedy, when a URI in a text holds a secret."""
    for match in _URI.finditer(text):
        if found := secret_in(match[0]):
            raise UsageError(
                f"{place}: {_bare(match[0])} holds {found}: leave it out, for a recipe is stored with its run and "
                "travels with a job, where others read it; credentials come from the environment (AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, ...) or the machine's role"
            )


def texts(content: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """The place and value of each text in nested lists and mappings, the keys included."""
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, dict):
        for key, value in content.items():
            inside = without_secrets(f"{place}.{key}" if place else str(key))
            yield inside, str(key)
            yield from texts(value, inside)
    elif isinstance(content, list | tuple | set):
        for i, value in enumerate(content):
            yield from texts(value, f"{place}.{i}")


def _bare(uri: str) -> str:
    scheme, mark, rest = uri.partition("://")
    return scheme + mark + re.split(r"[?#]", rest.rpartition("@")[2], maxsplit=1)[0]
