"""A lock that a killed holder does not keep: one process at a time writes a run or makes a data set.

The holder writes its name and a growing number beside the work every few seconds. Whoever finds a lock looks whether
its holder lives: on the same machine by its process, from elsewhere by watching whether the number still grows. So no
two machines' clocks are compared, and after a kill on this machine the same command goes on at once.

The file system must rename and link atomically and show a change to other nodes within `PATIENCE`; local disks and NFS
do. A holder that finds its lock taken over (it was suspended for longer than that) stops its work.
"""

import getpass
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from workflows.errors import WorkflowError

BEAT = 3.0
"""Seconds between signs of life."""
PATIENCE = 20.0
"""Seconds without one after which a holder on another machine counts as gone."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. The number of the process counts only on its own machine."""

    purpose: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    machine: str = field(default_factory=lambda: _machine())
    host: str = field(default_factory=socket.gethostname)
    user: str = field(default_factory=lambda: _user())
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=lambda: psutil.Process().create_time())
    job: str = field(default_factory=lambda: os.environ.get("MLMAMBA_JOB", ""))
    """Ray job of a submitted workflow."""

    def lives_here(self) -> bool | None:
        """Whether its process runs; None when it is on another machine, where only its beat tells."""
        if self.machine != _machine():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE  # killed, and its parent does not care
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"{self.user}@{self.host}, process {self.pid}" + (f", job {self.job}" if self.job else "")


class Lease:
    """Holds a lock file while the block runs.

        with Lease(run_folder / "lock.json", "recipe tiny"):
            ...

    Raises:
        WorkflowError: a living process holds it, or (at the end of the block) it was lost to another.
    """

    def __init__(self, file: Path, purpose: str, note: Callable[[str], None] = lambda text: None, wait: bool = False):
        """
        Args:
            file: the lock; its folder is made if need be.
            purpose: what the holder does, for the message to others.
            note: told when it has to wait.
            wait: wait for a living holder to end instead of raising.
        """
        self._file, self._note, self._wait = file, note, wait
        self._holder = Holder(purpose)
        self._over, self._lost = threading.Event(), False
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._file.parent.mkdir(parents=True, exist_ok=True)
        waited = False
        while not self._claim():
            holder = self._living_holder()
            if holder is None:
                continue
            text = f"{holder.purpose} is under way already ({holder}; {self._file})"
            if not self._wait:
                raise WorkflowError(f"{text}: wait for it, or stop it")
            if not waited:
                self._note(f"{text}; waiting for it")
            waited = True
            time.sleep(BEAT)
        self._beats.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._over.set()
        self._beats.join()
        if self._lost:
            raise WorkflowError(
                f"another process took over {self._file} while this one was suspended; this one has stopped"
            ) from error
        self._file.unlink(missing_ok=True)

    def _claim(self) -> bool:
        """Put our lock there unless there is one; of several that try, one succeeds."""
        beside = self._write(0)
        try:
            os.link(beside, self._file)
        except FileExistsError:
            return False
        except OSError:  # no hard links here: the file is there at once, and its text a moment later
            with suppress(FileExistsError), self._file.open("x") as file:
                file.write(beside.read_text())
                return True
            return False
        finally:
            beside.unlink()
        return True

    def _write(self, beat: int) -> Path:
        beside = self._file.with_name(f".{self._file.name}.{self._holder.token}")
        beside.write_text(json.dumps({"beat": beat, **asdict(self._holder)}, indent=2))
        return beside

    def _read(self) -> tuple[int, Holder] | tuple[None, None]:
        """Number and holder of the lock that is there; (None, None) when there is none, or it is no lock of ours."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            content = json.loads(self._file.read_text())
            return content.pop("beat"), Holder(**content)
        return None, None

    def _living_holder(self) -> Holder | None:
        """Who holds the lock; None when nobody does any more, and a dead holder's lock is gone."""
        beat, holder = self._read()
        if holder is None:
            time.sleep(BEAT / 4)
            if self._file.exists() and self._read() == (None, None):
                raise WorkflowError(f"{self._file} is not a lock that this version wrote; delete it if nothing runs")
            return None
        alive = holder.lives_here()
        if alive is None:
            self._note(f"locked by {holder}; looking whether it still runs")
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until and not alive:
                time.sleep(BEAT / 4)
                now, still = self._read()
                if still is None or still.token != holder.token:
                    return None
                alive = now != beat
        if alive:
            return holder
        self._remove(holder)
        return None

    def _remove(self, holder: Holder) -> None:
        """Take away a dead holder's lock, and nobody else's that came in its place meanwhile."""
        aside = self._file.with_name(f".{self._file.name}.{self._holder.token}.old")
        with suppress(FileNotFoundError):
            os.rename(self._file, aside)
            if json.loads(aside.read_text())["token"] != holder.token:
                with suppress(FileExistsError):
                    os.link(aside, self._file)
            aside.unlink()

    def _beat(self) -> None:
        beat = 0
        while not self._over.wait(BEAT):
            beat += 1
            with suppress(OSError):  # a full or absent disk: the workflow itself will say so
                _, holder = self._read()
                if holder is not None and holder.token != self._holder.token:
                    self._lost = True
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                os.replace(self._write(beat), self._file)


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
