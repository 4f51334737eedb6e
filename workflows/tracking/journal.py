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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipelines.storage import write_atomic

_PAUSES = (1.0, 60.0)
"""Seconds between attempts while the server does not answer: the first, and the longest after doubling."""
_AT_ONCE = 100
"""Entries that are sent together."""
FILES = ("tracking.jsonl", "tracking-sent.json")
"""In the run folder: the entries, and how many of them were sent to which run."""


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
        self.entries = self._read()
        self._sent = self._read_mark()
        self._changed, self._closing, self._away = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def add(self, entry: dict) -> None:
        """Write an entry down and return; it is sent when the server takes it."""
        with self._changed:
            self.entries.append(entry)
            try:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:  # a full disk must not stop training for the sake of its metrics
                self._warn(f"cannot write {self._file} ({error.strerror})")
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
                self._warn(f"MLflow does not answer ({short_reason(error, 160)})")
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

    def _warn(self, text: str) -> None:
        if not self._away:
            self._note(f"{text}: training goes on, and what it missed is sent later from {self._file.name}")
        self._away = True

    def _read(self) -> list[dict]:
        """The entries of the file, without a last one that a kill cut off."""
        if not self._file.exists():
            return []
        lines = self._file.read_bytes().split(b"\n")
        if lines[-1]:
            self._file.write_bytes(b"\n".join([*lines[:-1], b""]))
        return [json.loads(line) for line in lines[:-1] if line]

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
