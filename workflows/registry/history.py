"""The history of an alias: one tag of the registered model for each move, only ever added to.

A tag is written before the alias is set, so a crash between the two leaves a move in the history that was not made.
Each move therefore also records which version held the alias when it was written. Comparing that with the move before
shows whether the earlier one was made, and whether someone moved the alias by other means, such as MLflow's page.
"""

import getpass
import json
import logging
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from workflows.errors import WorkflowError

logger = logging.getLogger(__name__)
_PREFIX = "mlmamba.move."
_REASON = 2000  # characters


@dataclass(frozen=True)
class Move:
    """One move of an alias."""

    alias: str
    stamp: int
    """Nanoseconds since 1970, larger than that of the move before."""
    kind: str
    """promote or rollback."""
    to: str
    """Version that is to hold the alias."""
    was: str | None
    """Version that held it when this was written."""
    who: str
    """user@host."""
    why: str | None = None
    forced: bool = False
    """Whether the move was made although the gate failed."""

    def tag(self) -> tuple[str, str]:
        """Key and value of the tag."""
        content = asdict(self) | {"why": self.why and self.why[:_REASON]}
        return f"{_PREFIX}{self.alias}.{self.stamp:020d}", json.dumps(content)

    def as_dict(self) -> dict:
        """Plain data."""
        return asdict(self)


class UnreadableTag(WorkflowError):
    """A tag of the registry does not hold what mlmamba writes there: somebody else wrote it, or it was cut off."""


def read_tag(tags: Mapping[str, str], key: str, kind: Any, absent: Any = None) -> Any:
    """The value of a tag that holds JSON.

    Args:
        kind: its type, for pydantic.
        absent: the value where there is no such tag.

    Raises:
        UnreadableTag: naming the tag.
    """
    if key not in tags:
        return absent
    try:
        return TypeAdapter(kind).validate_json(tags[key])
    except (ValidationError, RecursionError) as error:
        raise UnreadableTag(f"the tag {key} cannot be read: {tags[key][:60]!r}") from error


def history(tags: Mapping[str, str], alias: str | None = None) -> list[Move]:
    """Read the moves from a registered model's tags, of one alias or of all, oldest first.

    A rollback must work whatever one tag says, so one that cannot be read is left out, with a warning.
    """
    moves = []
    for key in tags:
        if key.startswith(_PREFIX):
            try:
                moves.append(read_tag(tags, key, Move))
            except UnreadableTag as error:
                logger.warning("a move of an alias is left out: %s", error)
    return sorted((move for move in moves if alias in (None, move.alias)), key=lambda move: move.stamp)


def holders(moves: Iterable[Move], now: str | None) -> list[str]:
    """Return the versions that rollbacks can return to, oldest first; the last one holds the alias now.

    A promotion adds its version; a rollback removes the versions after its target, so none of them is returned to.

    Args:
        moves: of one alias, oldest first.
        now: version that holds the alias now.
    """
    stack: list[str] = []
    before: list[str] = []  # the stack before the last move, in case that move was not made
    for move in moves:
        stack = _as_found(stack, before, move.was)
        before = list(stack)
        if move.kind == "rollback" and move.to in stack:
            del stack[_last(stack, move.to) + 1 :]
        else:
            stack.append(move.to)
    return _as_found(stack, before, now)


def _as_found(stack: list[str], before: list[str], found: str | None) -> list[str]:
    """Correct the stack by the version that was found on the alias."""
    top = stack[-1] if stack else None
    if found is None or found == top:
        return stack
    if before and before[-1] == found:
        return list(before)
    return [*stack, found]


def _last(items: list[str], item: str) -> int:
    return len(items) - 1 - items[::-1].index(item)


def who_runs_this() -> str:
    """Return user@host of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
