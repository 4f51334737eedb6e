"""The lock of a run or data set in an object store, which has neither a rename nor a link.

Whoever wants it writes an object of its own into the lock's folder and then lists the folder. A store shows every write
to whoever lists later, so of two that come at the same moment at least one sees the other; it steps back and comes
again. Who sees nobody else marks its object as held. Objects have a growing number while their writer lives, as in
workflows/lease.py, and a dead one's object is removed by who finds it.
"""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pipelines import storage
from pipelines.storage import join, shown
from workflows.errors import WorkflowError
from workflows.lease import Holder, Lease
from workflows.storage import is_remote, place

BEAT = 5.0
"""Seconds between signs of life; each is a request or three."""
PATIENCE = 30.0
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
                time.sleep(BEAT)
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
            time.sleep(random.uniform(0.1, 1.0) * BEAT)
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
        first, until = self._read_others(), time.monotonic() + PATIENCE
        alive = {name: holder.lives_here() for name, (_, _, holder) in first.items()}
        told = False
        while None in alive.values() and time.monotonic() < until:
            if not told:
                (unknown, *_) = (first[name][2] for name, lives in alive.items() if lives is None)
                self._note(f"locked by {unknown}; looking whether it still runs")
            told = True
            time.sleep(BEAT / 2)
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
        while not self._over.wait(BEAT):
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
