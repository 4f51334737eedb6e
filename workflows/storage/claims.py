"""Who holds a lock, whether that holder lives, and the protocol of claims where nothing can compare and set.

Object stores and MLflow's tags have no conditional write. Whoever wants to go on there writes a claim of its own and
then lists all claims. Alone, it goes on; else it withdraws its claim and tries again after a random pause. Because
everyone writes before listing, two never go on together wherever a list shows all earlier writes, as those of S3, GCS
and a single database do. Hand-written because no package that we depend on has such a protocol.
"""

import getpass
import json
import math
import os
import random
import socket
import stat
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import psutil

from workflows.console import printable

BEAT = 3.0
"""Seconds between a holder's signs of life."""
PATIENCE = 20.0
"""Seconds without one after which a holder on another machine counts as dead. All contenders must agree on it."""

_LARGEST = 1 << 16
"""Bytes of a claim; ours have under a thousand."""

Who = TypeVar("Who")


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. The process number counts only on its own machine."""

    purpose: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    machine: str = field(default_factory=lambda: _machine())
    host: str = field(default_factory=socket.gethostname)
    user: str = field(default_factory=lambda: _user())
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=lambda: psutil.Process().create_time())
    job: str = field(default_factory=lambda: os.environ.get("MLMAMBA_JOB", ""))
    """Ray job of a submitted workflow."""

    @classmethod
    def read(cls, content: Any) -> "Holder":
        """The holder in what was read from a lock, which anybody may have written.

        Raises:
            ValueError: a field lacks, is of another type, or holds no number of a process or time.
        """
        if not isinstance(content, dict) or content.keys() != {each.name for each in fields(cls)}:
            raise ValueError("a holder has other fields")
        texts = {name: value for name, value in content.items() if name not in ("pid", "started")}
        if not all(isinstance(value, str) for value in texts.values()):
            raise ValueError("a holder's texts are of another type")
        pid, started = content["pid"], content["started"]
        if type(pid) is not int or not 0 < pid < 1 << 31:
            raise ValueError(f"{pid!r} is no process")
        if type(started) not in (int, float) or not math.isfinite(started):
            raise ValueError(f"{started!r} is no time")
        return cls(**texts, pid=pid, started=float(started))

    def lives_here(self) -> bool | None:
        """Whether its process runs; None when it is on another machine, where only its beat tells."""
        if self.machine != _machine():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE  # killed, and not yet reaped by its parent
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        text = f"{self.user}@{self.host}, process {self.pid}" + (f", job {self.job}" if self.job else "")
        return printable(text)[:300]  # it may come from a file that anybody wrote


def parse_claim(data: bytes) -> Any:
    """The JSON of a claim. Raises ValueError when it is too large, or none."""
    if len(data) > _LARGEST:
        raise ValueError(f"a claim has at most {_LARGEST} bytes")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_claim_file(path: Path) -> bytes:
    """The first bytes of a file, as many as a claim may have and one. Never waits for a pipe. Raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        return file.read(_LARGEST + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""


class Seen(NamedTuple):
    """A lock or claim as it was read."""

    beat: int
    """Changes while its holder lives."""
    held: bool
    """Whether it is known to have won."""
    holder: Holder


def living(seen: dict[str, Seen], look: Callable[[], dict[str, Seen]], note: Callable[[str], None]) -> dict[str, Seen]:
    """Select the locks or claims whose holders live.

    A holder on this machine is judged by its process, one elsewhere by whether its beat changes within PATIENCE, so no
    two machines' clocks are compared.

    Args:
        seen: what was found, by name.
        look: finds it again.
        note: told when that takes time.
    """
    alive = {name: one.holder.lives_here() for name, one in seen.items()}
    until = time.monotonic() + PATIENCE
    if unknown := [seen[name].holder for name, lives in alive.items() if lives is None]:
        note(f"locked by {unknown[0]}; looking whether it still runs")
    while None in alive.values() and time.monotonic() < until:
        time.sleep(BEAT / 4)
        now = look()
        for name in [name for name, lives in alive.items() if lives is None]:
            if name not in now:
                alive[name] = False
            elif now[name].beat != seen[name].beat:
                alive[name] = True
    return {name: one for name, one in seen.items() if alive[name]}


class Claims(Protocol[Who]):
    """Where the claims on one thing are kept, and how it is known which of them are of the dead."""

    def write(self) -> None:
        """Write a claim of one's own."""

    def others(self) -> list[tuple[Who, bool]]:
        """List others' claims, each with whether it is known to have won. Those of the dead are deleted instead."""

    def withdraw(self) -> None:
        """Delete one's own claim."""


def win(claims: Claims[Who], pause: float, wait: float) -> Who | None:
    """Claim until nobody else does. Returns None when our claim has won and stands, else who is in the way.

    Args:
        pause: the longest pause between two tries, in seconds.
        wait: seconds after which to give up. One gives up at once before a claim that is known to have won.
    """
    until = time.monotonic() + wait
    while True:
        claims.write()
        if not (others := claims.others()):
            return None
        claims.withdraw()
        winners = [who for who, won in others if won]
        if winners or time.monotonic() > until:
            return (winners or [others[0][0]])[0]
        time.sleep(random.uniform(0.1, 1.0) * pause)


def _machine() -> str:
    """Changes with the machine, its restart, and the container, whose process numbers are its own."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
