"""What a workflow has to tell MLflow, first written down in the run folder and then sent in the background.

So a tracking server that is slow or away neither stops nor delays training; nothing is lost when the process is killed
before it was sent; and a resumed workflow, whose steps since the last checkpoint come a second time, sends each step
once. Every entry has its time from when it was made: MLflow takes the same metric, step, time and value for the same
point, so sending once more what a killed process may have sent already changes nothing.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.storage import write_atomic
from workflows.storage.folder import Folder

_PAUSES = (1.0, 60.0)
"""Seconds between attempts while the server does not answer: the first, and the longest after doubling."""
_AT_ONCE = 100
"""Entries that are sent together."""
FILES = ("tracking.jsonl", "tracking-sent.json")
"""In the run folder: the entries, and how many of them were sent to which run."""
_UPLOAD_SECONDS = 30.0
"""Between two uploads of a run's journal."""


class Refused(Exception):
    """The server will never take this entry; sending it again is of no use."""


class Journal:
    """Entries of one run, and the thread that sends them.

    Attributes:
        entries: all of them, in order, those of earlier processes included.
    """

    def __init__(self, folder: Path, run_id: str, send: Callable[[list[dict]], None], note: Callable[[str], None]):
        """
        Args:
            folder: run folder; holds FILES.
            run_id: MLflow run. For another run than before, all is sent once more.
            send: sends entries; raises Refused for what cannot be sent, anything else to be called again.
            note: told when the server goes away and comes back.
        """
        self._file, self._mark = (folder / name for name in FILES)
        self._run_id, self._send, self._note = run_id, send, note
        self._unwritten: list[dict] = []  # the disk was full
        self.entries, sure = self._read()
        self._size = self._file.stat().st_size if self._file.exists() else 0
        self._sent = min(self._read_mark(), sure)
        self._changed, self._closing, self._away = threading.Condition(), False, False
        self._full = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def add(self, entry: dict) -> None:
        """Write an entry down and return; it is sent when the server takes it."""
        with self._changed:
            self.entries.append(entry)
            self._unwritten.append(entry)
            try:
                with self._file.open("ab") as file:
                    file.truncate(self._size)  # without the half a line that a full disk left
                    file.write("".join(json.dumps(one) + "\n" for one in self._unwritten).encode())
                self._size = self._file.stat().st_size
                self._unwritten.clear()
                self._full = False
            except OSError as error:  # a full disk must not stop training for the sake of its metrics
                if not self._full:
                    self._note(f"cannot write {self._file} ({error.strerror}): training goes on, it is tried again")
                self._full = True
            self._changed.notify()

    def drain(self, seconds: float) -> bool:
        """Wait until everything is sent. Returns whether it is."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._sent < len(self.entries):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def close(self, seconds: float) -> bool:
        """Send what is left, as far as that takes no longer, and end the thread. Returns whether all is sent."""
        done = self.drain(seconds)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if done:
            self._thread.join(seconds)
        return done

    @property
    def unsent(self) -> int:
        return len(self.entries) - self._sent

    def _work(self) -> None:
        pause = _PAUSES[0]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._sent < len(self.entries))
                if self._closing:
                    return
                batch = self.entries[self._sent : self._sent + _AT_ONCE]
            try:
                self._deliver(batch)
            except Exception as error:  # whatever a network, a server or a locked database can raise
                if not self._away:
                    self._note(
                        f"MLflow does not answer ({short_reason(error, 160)}): training goes on, and what it missed is "
                        f"sent later from {self._file.name}"
                    )
                self._away = True
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, pause)
                pause = min(2 * pause, _PAUSES[1])
                continue
            if self._away:
                self._note("MLflow answers again")
            self._away, pause = False, _PAUSES[0]
            with self._changed:
                self._sent += len(batch)
                with suppress(OSError):
                    write_atomic(self._mark, json.dumps({"run_id": self._run_id, "entries": self._sent}))
                self._changed.notify_all()

    def _deliver(self, batch: list[dict]) -> None:
        try:
            self._send(batch)
        except Refused as error:
            if len(batch) > 1:
                for entry in batch:
                    self._deliver([entry])
            else:
                self._note(f"MLflow refuses an entry, which is left out: {error}")

    def _read(self) -> tuple[list[dict], int]:
        """The entries of the file, without a last one that a kill cut off, and how many stand before the first line
        that cannot be read. Such lines are left out with a note; all after them is sent once more."""
        if not self._file.exists():
            return [], 0
        lines = self._file.read_bytes().split(b"\n")
        if lines[-1]:
            write_atomic(self._file, b"\n".join([*lines[:-1], b""]))
        entries, damaged = [], []
        for number, line in enumerate(lines[:-1], 1):
            if not line:
                continue
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError("not an object")
                entries.append(entry)
            except ValueError:
                damaged.append((number, len(entries)))
        if not damaged:
            return entries, len(entries)
        numbers = ", ".join(str(number) for number, _ in damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        self._note(f"{self._file}: {len(damaged)} lines cannot be read and are left out (line {numbers})")
        return entries, damaged[0][1]

    def _read_mark(self) -> int:
        with suppress(OSError, ValueError, KeyError):
            mark = json.loads(self._mark.read_text())
            if mark["run_id"] == self._run_id:
                return min(int(mark["entries"]), len(self.entries))
        return 0


def short_reason(error: Exception, most: int = 300) -> str:
    """The first line of an error without the password that may stand in an address in it."""
    lines = str(error).strip().splitlines() or [""]
    line = re.sub(r"://[^/@\s]+@", "://", lines[0])
    return f"{type(error).__name__}: {line[:most]}"


@contextmanager
def mirrored(folder: Folder, names: tuple[str, ...], note: Callable[[str], None]) -> Iterator[None]:
    """Fetch files of a folder before the block; upload them while it runs, every half minute, and after it.

    Of a file that is here and in the store, the one here stays if it begins with the other. A machine that goes on
    after another was lost misses half a minute at most. For a folder on a disk nothing is done. A thread of its own,
    because the last entries must reach the store also when no more of them come.

    Args:
        note: told when the store does not take them.
    """
    if not folder.remote:
        yield
        return
    sent = {name: _fetch_longer(folder, name) for name in names}
    over, away = threading.Event(), False

    def upload_changed() -> None:
        nonlocal away
        try:
            for name in names:
                file = folder.local / name
                content = file.read_bytes() if file.exists() else b""
                if content != sent[name]:
                    folder.write(name, content)
                    sent[name] = content
            away = False
        except OSError as error:  # training does not end for the sake of its log
            if not away:
                note(f"the store does not take the run's journal, which is sent later: {error}")
            away = True

    def work() -> None:
        while not over.wait(_UPLOAD_SECONDS):
            upload_changed()

    thread = threading.Thread(target=work, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        upload_changed()


def _fetch_longer(folder: Folder, name: str) -> bytes:
    """What the store has of a file; written to the copy unless that begins with it."""
    try:
        there = folder.read(name)
    except FileNotFoundError:
        return b""
    file = folder.local / name
    here = file.read_bytes() if file.exists() else b""
    if not here.startswith(there):
        write_atomic(file, there)
    return there
