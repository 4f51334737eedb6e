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
import random
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

from pipelines import storage
from pipelines.storage import join, shown
from workflows.errors import WorkflowError
from workflows.storage.remote import is_remote, place

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
        while (holder := self._take(self._file)) is not None:
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
        if self._lost or self._taken_over():
            raise WorkflowError(
                f"another process took over {self._file} while this one was suspended; this one has stopped"
            ) from error
        for left in self._file.parent.glob(f"{self._file.name}.*"):  # by an heir that was killed, see _inherit
            left.unlink(missing_ok=True)
        self._file.unlink(missing_ok=True)

    def _take(self, file: Path) -> Holder | None:
        """Make a lock file ours. Returns the living process that has it, or None when it is ours."""
        while not self._create(file):
            beat, holder = self._read(file)
            if holder is None:
                time.sleep(BEAT / 4)
                if file.exists() and self._read(file) == (None, None):
                    raise WorkflowError(f"{file} is not a lock that this version wrote; delete it if nothing runs")
            elif self._lives(file, beat, holder):
                return holder
            else:
                other = self._take(_inheritance(file, holder))
                if other is not None:
                    return other
                if self._inherit(file, holder):
                    return None
        return None

    def _inherit(self, file: Path, dead: Holder) -> bool:
        """Put our lock in a dead holder's place; False when another came first.

        Of those that find the same holder dead, the one that holds the inheritance, a lock of its own, may replace its
        lock. So nobody replaces the lock of somebody that lives: a dead holder's token never comes back, and who comes
        late finds another in its place.
        """
        try:
            _, still = self._read(file)
            if still is None or still.token != dead.token:
                return False
            os.replace(self._write(0), file)
            return True
        finally:
            _inheritance(file, dead).unlink(missing_ok=True)

    def _create(self, file: Path) -> bool:
        """Put our lock there unless there is one; of several that try, one succeeds."""
        beside = self._write(0)
        try:
            os.link(beside, file)
        except FileExistsError:
            return False
        except OSError:  # no hard links here: the file is there at once, and its text a moment later
            with suppress(FileExistsError), file.open("x") as opened:
                opened.write(beside.read_text())
                return True
            return False
        finally:
            beside.unlink()
        return True

    def _write(self, beat: int) -> Path:
        beside = self._file.with_name(f".{self._file.name}.{self._holder.token}")
        beside.write_text(json.dumps({"beat": beat, **asdict(self._holder)}, indent=2))
        return beside

    def _read(self, file: Path) -> tuple[int, Holder] | tuple[None, None]:
        """Number and holder of the lock that is there; (None, None) when there is none, or it is no lock of ours."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            content = json.loads(file.read_text())
            return content.pop("beat"), Holder(**content)
        return None, None

    def _lives(self, file: Path, beat: int, holder: Holder) -> bool:
        """Whether the holder of a lock is there; it is not when the lock has gone from it meanwhile."""
        alive = holder.lives_here()
        if alive is None:
            self._note(f"locked by {holder}; looking whether it still runs")
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until and not alive:
                time.sleep(BEAT / 4)
                now, still = self._read(file)
                if still is None or still.token != holder.token:
                    return False
                alive = now != beat
        return bool(alive)

    def _taken_over(self) -> bool:
        _, holder = self._read(self._file)
        return holder is not None and holder.token != self._holder.token

    def _beat(self) -> None:
        beat = 0
        while not self._over.wait(BEAT):
            beat += 1
            with suppress(OSError):  # a full or absent disk: the workflow itself will say so
                if self._taken_over():
                    self._lost = True
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                os.replace(self._write(beat), self._file)


def _inheritance(file: Path, dead: Holder) -> Path:
    """The lock that whoever replaces a dead holder's lock must have."""
    return file.with_name(f"{file.name}.{dead.token}")


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


STORE_BEAT = 5.0
"""Seconds between signs of life; each is a request or three."""
STORE_PATIENCE = 30.0
"""Seconds without one after which a claim of another machine counts as a dead one's."""
_TRIES = 6
"""How often one steps back before another that wants the lock too."""
_READS = 10


def lease(
    file: Path, purpose: str, note: Callable[[str], None] = lambda text: None, wait: bool = False
) -> "Lease | StoreLease":
    """The lock `file`, or its place in the object store. Arguments and errors are those of Lease."""
    where = place(file)
    return StoreLease(where, purpose, note, wait) if is_remote(where) else Lease(file, purpose, note, wait)


class StoreLease:
    """Holds a lock while the block runs.

    Raises:
        WorkflowError: a living process holds it, or (at the end of the block) it was lost to another.
        OSError: the store does not answer.
    """

    def __init__(self, uri: str, purpose: str, note: Callable[[str], None] = lambda text: None, wait: bool = False):
        """
        Args:
            uri: folder of the lock.
            purpose, note, wait: as Lease has them.
        """
        self._uri, self._note, self._wait = uri, note, wait
        self._holder = Holder(purpose)
        self._own = join(uri, f"{self._holder.token}.json")
        self._writing = threading.Lock()
        self._there, self._held, self._lost, self._beat = False, False, False, 0
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._live, name="lease", daemon=True)

    def __enter__(self) -> "StoreLease":
        self._beats.start()
        try:
            waited = False
            while (other := self._claim()) is not None:
                text = f"{other.purpose} is under way already ({other}; {shown(self._uri)})"
                if not self._wait:
                    raise WorkflowError(f"{text}: wait for it, or stop it")
                if not waited:
                    self._note(f"{text}; waiting for it")
                waited = True
                time.sleep(STORE_BEAT)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._end()
        if self._lost:
            raise WorkflowError(
                f"another process took over {shown(self._uri)} while this one was suspended; this one has stopped"
            ) from error

    def _end(self) -> None:
        self._over.set()
        self._beats.join()
        with suppress(OSError):  # who comes next finds that nobody lives behind it
            self._step_back()

    def _claim(self) -> Holder | None:
        """Take the lock. Returns who has it, or None when it is ours."""
        for _ in range(_TRIES):
            self._write(held=False)
            others = self._living()
            if not others:
                self._write(held=True)
                return None
            self._step_back()
            for holder, held in others:
                if held:
                    return holder
            time.sleep(random.uniform(0.1, 1.0) * STORE_BEAT)
        return others[0][0]

    def _write(self, held: bool) -> None:
        with self._writing:
            self._there, self._held = True, held
            self._put()

    def _put(self) -> None:
        self._beat += 1
        content = {"beat": self._beat, "held": self._held, **asdict(self._holder)}
        storage.write_atomic(self._own, json.dumps(content, indent=2).encode())

    def _step_back(self) -> None:
        with self._writing:
            self._there = self._held = False
            storage.delete(self._own)

    def _read_others(self) -> dict[str, tuple[int, bool, Holder]]:
        """Number, whether held, and holder of every claim but ours, by name."""
        names = [name for name in storage.list_names(self._uri) if name != f"{self._holder.token}.json"]
        found = {name: self._read(name) for name in names}
        return {name: claim for name, claim in found.items() if claim is not None}

    def _read(self, name: str) -> tuple[int, bool, Holder] | None:
        """One claim; None when it is gone. While it is replaced it may be cut off, which must not look like absence."""
        for _ in range(_READS):
            try:
                content = json.loads(storage.read_bytes(join(self._uri, name)))
                return content.pop("beat"), content.pop("held"), Holder(**content)
            except FileNotFoundError:
                return None
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                time.sleep(0.2)
        raise WorkflowError(
            f"{shown(join(self._uri, name))} is not a lock that this version wrote; delete it if nothing runs"
        )

    def _living(self) -> list[tuple[Holder, bool]]:
        """The others that live; what the dead left is removed."""
        first, until = self._read_others(), time.monotonic() + STORE_PATIENCE
        alive = {name: holder.lives_here() for name, (_, _, holder) in first.items()}
        told = False
        while None in alive.values() and time.monotonic() < until:
            if not told:
                (unknown, *_) = (first[name][2] for name, lives in alive.items() if lives is None)
                self._note(f"locked by {unknown}; looking whether it still runs")
            told = True
            time.sleep(STORE_BEAT / 2)
            now = self._read_others()
            for name, lives in alive.items():
                if lives is None and name not in now:
                    alive[name] = False
                elif lives is None and now[name][0] != first[name][0]:
                    alive[name], first[name] = True, now[name]
        for name, lives in alive.items():
            if not lives:
                storage.delete(join(self._uri, name))
        return [(first[name][2], first[name][1]) for name, lives in alive.items() if lives]

    def _live(self) -> None:
        while not self._over.wait(STORE_BEAT):
            with suppress(OSError, WorkflowError):  # the store does not answer: the workflow itself will say so
                if self._held and self._taken_over():
                    self._lost = True
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                with self._writing:
                    if self._there:
                        self._put()

    def _taken_over(self) -> bool:
        return storage.size(self._own) is None or any(held for _, held, _ in self._read_others().values())
