"""One mover of an alias at a time, on any registry.

MLflow has no compare-and-set: setting an alias overwrites. So a mover holds a claim (`storage/claims.py`), which is a
tag of the registered model with a key of its own. Claims left behind (their owner was killed) count no more after
`EXPIRES` seconds, by the clocks of the machines.

Not covered: MLflow's own page and clients, which move aliases without asking; an owner that is stopped for longer than
`EXPIRES` between its last look and its write; clocks that differ by more than that; replicated databases that answer a
read from before one's own write.
"""

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from workflows.console import printable
from workflows.errors import WorkflowError
from workflows.registry.history import who_runs_this
from workflows.registry.models import reachable
from workflows.storage.claims import win

EXPIRES = 60.0
_WAIT = 90.0  # longer than EXPIRES: a claim left behind does not fail the next mover
_PAUSE = 0.6


class Claim:
    """The right to move an alias, for a while: a tag whose key says when it was written."""

    def __init__(self, client: MlflowClient, name: str, alias: str):
        self.what = f"{name}@{alias}"
        self._client, self._name, self._prefix = client, name, f"mlmamba.claim.{alias}."
        self._key, self._taken = "", 0.0

    def check(self) -> None:
        """Raise WorkflowError when it is too old to be sure of: call just before the write that it protects."""
        if time.monotonic() - self._taken > EXPIRES / 2:
            raise WorkflowError(f"the registry took too long: {self.what} was not moved; run the command again")

    def write(self) -> None:
        """Write the tag."""
        self._taken = time.monotonic()
        self._key = f"{self._prefix}{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._client.set_registered_model_tag(self._name, self._key, json.dumps({"who": who_runs_this()}))

    def others(self) -> list[tuple[str, bool]]:
        """Owners of the claims that have not expired. A tag does not tell whether its claim has won."""
        found = []
        for key, value in self._client.get_registered_model(self._name).tags.items():
            if key.startswith(self._prefix) and key != self._key:
                if _expired(key.removeprefix(self._prefix).split("-")[0]):
                    self._delete(key)
                else:
                    found.append((_owner(value), False))
        return found

    def withdraw(self) -> None:
        """Delete the tag."""
        self._delete(self._key)

    def _delete(self, key: str) -> None:
        with suppress(MlflowException):  # it expires
            self._client.delete_registered_model_tag(self._name, key)


def _expired(stamp: str) -> bool:
    """Whether a claim of this time counts no more. One that is nobody's, or of a time to come, never did."""
    if len(stamp) > 20 or not stamp.isdecimal():
        return True
    return abs(time.time() - int(stamp) / 1e9) > EXPIRES


def _owner(value: str) -> str:
    try:
        return printable(str(json.loads(value)["who"]))[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another"


@contextmanager
def claim(client: MlflowClient, name: str, alias: str, wait: float = _WAIT) -> Iterator[Claim]:
    """Hold the right to move an alias of a model that exists.

    Args:
        wait: seconds to wait for others.

    Raises:
        WorkflowError: others hold it for longer, or the registry does not answer.
    """
    own = Claim(client, name, alias)
    with reachable():
        owner = win(own, _PAUSE, wait)
    if owner is not None:
        raise WorkflowError(f"{own.what} is being moved by {owner}; try again in a minute")
    try:
        yield own
    finally:
        own.withdraw()
