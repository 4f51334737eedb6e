"""One mover of an alias at a time, on any registry.

MLflow has no compare-and-set: setting an alias overwrites. So whoever wants to move one first writes a claim, a tag of
the registered model with a key of its own, and then reads all claims. Alone, it goes on; else it takes its claim back
and tries again after a random pause. Writing before reading makes it impossible that two go on, on one database. Claims
left behind (their owner was killed) count no more after `EXPIRES` seconds, by the clocks of the machines.

Not covered: MLflow's own page and clients, which move aliases without asking; an owner that is stopped for longer than
`EXPIRES` between its last look and its write; clocks that differ by more than that; replicated databases that answer a
read from before one's own write.
"""

import json
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from workflows.errors import WorkflowError
from workflows.registry.history import who_runs_this
from workflows.registry.models import reachable

EXPIRES = 60.0
_WAIT = 90.0  # longer than EXPIRES: a claim left behind does not fail the next mover


@dataclass(frozen=True)
class Claim:
    """The right to move an alias, for a while."""

    what: str
    taken: float

    def check(self) -> None:
        """Raise WorkflowError when it is too old to be sure of: call just before the write that it protects."""
        if time.monotonic() - self.taken > EXPIRES / 2:
            raise WorkflowError(f"the registry took too long: {self.what} was not moved; run the command again")


@contextmanager
def claim(client: MlflowClient, name: str, alias: str, wait: float = _WAIT) -> Iterator[Claim]:
    """Hold the right to move an alias of a model that exists.

    Args:
        wait: seconds to wait for others.

    Raises:
        WorkflowError: others hold it for longer, or the registry does not answer.
    """
    prefix = f"mlmamba.claim.{alias}."
    give_up = time.monotonic() + wait
    while True:
        taken = time.monotonic()
        key = f"{prefix}{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        value = json.dumps({"who": who_runs_this()})
        with reachable():
            client.set_registered_model_tag(name, key, value)
            others = _claims(client, name, prefix, key)
        if not others:
            break
        _release(client, name, key)
        if time.monotonic() > give_up:
            owner = json.loads(next(iter(others.values())))["who"]
            raise WorkflowError(f"{name}@{alias} is being moved by {owner}; try again in a minute")
        time.sleep(random.uniform(0.1, 0.6))
    try:
        yield Claim(f"{name}@{alias}", taken)
    finally:
        _release(client, name, key)


def _claims(client: MlflowClient, name: str, prefix: str, own: str) -> dict[str, str]:
    """Others' claims that have not expired; those that have are deleted."""
    found = {}
    for key, value in client.get_registered_model(name).tags.items():
        if not key.startswith(prefix) or key == own:
            continue
        age = time.time() - int(key.removeprefix(prefix).split("-")[0]) / 1e9
        if age > EXPIRES:
            _release(client, name, key)
        else:
            found[key] = value
    return found


def _release(client: MlflowClient, name: str, key: str) -> None:
    with suppress(MlflowException):  # it expires
        client.delete_registered_model_tag(name, key)
