"""A lock that a killed holder does not keep: one process at a time writes a run or makes a data set.

A holder shows a sign of life every few seconds. After a kill on this machine the same command goes on at once, after
the loss of a machine within half a minute. A holder that finds its lock taken over (it was suspended for longer than
that) stops its process by SIGTERM and says so at the end.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock, SoftFileLease, Timeout

from pipelines import storage
from pipelines.storage import join, shown
from workflows.console import printable
from workflows.errors import WorkflowError
from workflows.storage import claims
from workflows.storage.claims import Holder, Seen


@contextmanager
def lock(
    where: Path | str, purpose: str, note: Callable[[str], None] = lambda text: None, wait: bool = False
) -> Iterator[None]:
    """Hold a lock while the block runs.

    Args:
        where: the lock file, whose folder is made if need be; or the URI of the lock's folder in an object store.
        purpose: what the holder does, for the message to others.
        note: told when one has to wait.
        wait: wait for a living holder to end instead of raising.

    Raises:
        WorkflowError: a living process holds it, something else is in its place, or (at the end of the block) it was
            lost to another.
        OSError: the disk or the store does not answer.
    """
    told = set()

    def note_once(text: str) -> None:
        if text not in told:
            told.add(text)
            note(text)

    remote = "://" in str(where) and not str(where).startswith("file://")
    held = (_StoreLock if remote else _FileLock)(str(where), Holder(purpose), note_once)
    try:
        while (other := held.take()) is not None:
            text = f"{printable(other.purpose)[:200]} is under way already ({other}; {shown(str(where))})"
            if not wait:
                raise WorkflowError(f"{text}: wait for it, or stop it")
            note_once(f"{text}; waiting for it")
            time.sleep(claims.BEAT)
        yield
    finally:
        if held.release():
            raise WorkflowError(
                f"another process took over {shown(str(where))}, or deleted it, while this one was suspended; "
                "this one has stopped"
            )


class _FileLock:
    """A lock file: filelock's SoftFileLease, which creates it, touches it at every beat and finds out its loss.

    Our own are four things that the lease does not do. It does not know the holder's user, purpose and job: they stand
    in `<lock>.holder`. It takes a zombie for a living process, and it takes over only where two files can be exchanged
    by one rename, which local disks can and NFS and other cluster file systems cannot: there we remove a dead holder's
    file, under `<lock>.takeover`, so that nobody removes the file of somebody that lives. And it replaces any file that
    it cannot read, such as version 0.1's locks, which we name instead.
    """

    def __init__(self, uri: str, holder: Holder, note: Callable[[str], None]):
        self._file, self._holder, self._note = Path(storage.open_fs(uri)[1]), holder, note
        self._beside = self._file.with_name(f"{self._file.name}.holder")
        self._takeover = self._file.with_name(f"{self._file.name}.takeover")
        self._lease = SoftFileLease(
            self._file,
            lease_duration=claims.PATIENCE,
            heartbeat_interval=claims.BEAT,
            on_compromise=lambda loss: os.kill(os.getpid(), signal.SIGTERM),
            thread_local=False,
        )

    def take(self) -> Holder | None:
        """Take the lock. Returns the living process that has it, or None when it is ours."""
        while True:
            for beside in (self._beside, self._takeover):
                if beside.exists() and not beside.is_file():
                    raise WorkflowError(f"{beside} is not a file that a lock writes: delete it if nothing runs")
            seen = self._look()
            if alive := claims.living(seen, self._look, self._note):
                return next(iter(alive.values())).holder
            guard = FileLock(self._takeover, timeout=claims.PATIENCE)
            with guard if seen else nullcontext():
                if self._acquire():
                    return None
                if (owner := self._lease.owner) is not None and owner.token in seen:
                    self._file.unlink(missing_ok=True)
            time.sleep(0.02)

    def release(self) -> bool:
        """Give the lock up, held or not. Returns whether it had been lost."""
        if not self._lease.is_locked:
            return False
        if (owner := self._lease.owner) is not None and owner.token == self._lease.token:
            for beside in self._file.parent.glob(f"{self._file.name}.*"):  # also what killed contenders left
                if beside.is_symlink() or not beside.is_dir():  # a folder is not ours
                    beside.unlink(missing_ok=True)
        self._lease.release()
        return self._lease.compromise is not None

    def _acquire(self) -> bool:
        try:
            self._lease.acquire(blocking=False)
        except Timeout:
            return False
        content = asdict(replace(self._holder, token=self._lease.token))
        storage.write_atomic(str(self._beside), json.dumps(content, indent=2).encode())
        return True

    def _look(self) -> dict[str, Seen]:
        """The lock that is there, by its token; none when it is free."""
        unread = None
        for pause in (0.0, 0.5):  # it, or its holder's name, may be half written
            time.sleep(pause)
            owner = self._lease.owner
            try:
                state = self._file.lstat()
            except FileNotFoundError:
                return {}
            if owner is None or owner.mode != "lease":
                if unread == (state.st_ino, state.st_mtime_ns):
                    raise WorkflowError(
                        f"{self._file} is not a lock that this version wrote (version 0.1 or another program did): "
                        "delete it if nothing runs"
                    )
                unread = state.st_ino, state.st_mtime_ns
                continue
            holder = Holder("another workflow", owner.token, "", owner.hostname, "unknown", owner.pid, 0.0, "")
            with suppress(OSError, ValueError):
                named = Holder.read(claims.parse_claim(claims.read_claim_file(self._beside)))
                if named.token == owner.token:
                    return {owner.token: Seen(state.st_mtime_ns, True, named)}
        return {} if owner is None else {owner.token: Seen(state.st_mtime_ns, True, holder)}


class _StoreLock:
    """A folder of an object store with one file for each claim, whose number grows with every beat.

    Hand-written because filelock needs a file system that creates and renames atomically.
    """

    def __init__(self, uri: str, holder: Holder, note: Callable[[str], None]):
        self._uri, self._holder, self._note = uri, holder, note
        self._own = f"{holder.token}.json"
        self._writing = threading.Lock()
        self._beat, self._held, self._lost = 0, None, False  # held: None while no claim of ours stands
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._live, name="lock", daemon=True)
        self._beats.start()

    def take(self) -> Holder | None:
        """Take the lock. Returns the living process that has it, or None when it is ours."""
        other = claims.win(self, claims.BEAT, 2 * claims.PATIENCE)  # one look at a dead holder takes PATIENCE
        if other is None:
            self._put(held=True)
        return other

    def release(self) -> bool:
        """Give the lock up, held or not. Returns whether it had been lost."""
        self._over.set()
        self._beats.join()
        with suppress(OSError):  # the next contender finds that this process is gone
            self.withdraw()
        return self._lost

    def write(self) -> None:
        """Write a claim that has not won yet."""
        self._put(held=False)

    def withdraw(self) -> None:
        """Delete our claim."""
        with self._writing:
            self._held = None
            storage.delete(join(self._uri, self._own))

    def others(self) -> list[tuple[Holder, bool]]:
        """Living holders of other claims, and whether each has won. The claims of the dead are deleted."""
        seen = self._look()
        alive = claims.living(seen, self._look, self._note)
        for name in seen.keys() - alive.keys():
            storage.delete(join(self._uri, name))
        return [(one.holder, one.held) for one in alive.values()]

    def _put(self, held: bool | None = None) -> None:
        """Write our claim; with None as it is, if it stands."""
        with self._writing:
            self._held = self._held if held is None else held
            if self._held is None:
                return
            self._beat += 1
            content = {"beat": self._beat, "held": self._held, **asdict(self._holder)}
            storage.write_atomic(join(self._uri, self._own), json.dumps(content, indent=2).encode())

    def _look(self) -> dict[str, Seen]:
        """Every claim but ours, by name."""
        found = {name: self._read(name) for name in storage.list_names(self._uri) if name != self._own}
        return {name: claim for name, claim in found.items() if claim is not None}

    def _read(self, name: str) -> Seen | None:
        """One claim; None when it is gone. While it is replaced it may be cut off, which must not look like absence."""
        for _ in range(10):
            try:
                where = join(self._uri, name)
                content = claims.parse_claim(b"" if (storage.size(where) or 0) > 1 << 20 else storage.read_bytes(where))
                beat, held = content.pop("beat"), content.pop("held")
                if type(beat) is not int or type(held) is not bool:
                    raise ValueError("beat and held are a number and a truth")
                return Seen(beat, held, Holder.read(content))
            except FileNotFoundError:
                return None
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                time.sleep(0.2)
        where = printable(shown(join(self._uri, name)))
        raise WorkflowError(f"{where} is not a lock that this version wrote; delete it if nothing runs")

    def _live(self) -> None:
        while not self._over.wait(claims.BEAT):
            with suppress(OSError, WorkflowError):  # the store does not answer: the workflow itself will say so
                if self._held and self._taken_over():
                    self._lost = True
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._put()

    def _taken_over(self) -> bool:
        gone = storage.size(join(self._uri, self._own)) is None
        return gone or any(claim.held for claim in self._look().values())
