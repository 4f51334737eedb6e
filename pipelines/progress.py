"""Progress of a preparation, as plain events."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_SECONDS_BETWEEN_EVENTS = 0.5
_WINDOW = 60.0  # seconds that the rate is taken over: long enough to be steady, short enough to follow the sources


@dataclass(frozen=True)
class Progress:
    """How far a phase is."""

    phase: str
    """What is being done: "tokenizer", "records" (listing them), "tokenize", "pack" and others; "finished" is last.
    What takes a while and counts nothing ("starting Ray on this machine") has no `unit`."""
    done: int
    total: int | None
    """None while it is not known how many there are."""
    unit: str
    """What is counted: "records", "rows" or "shards"."""
    per_second: float = 0.0
    """Units per second in the last minute; skipped ones not counted."""
    quarantined: int = 0
    """Records set aside so far in this phase."""
    skipped: int = 0
    """Units of `done` that an earlier run had done."""
    seconds: float = 0.0
    """Since the phase began."""

    @property
    def seconds_left(self) -> float | None:
        """Until the phase ends at this rate. None while that cannot be told."""
        if self.total is None or not self.per_second:
            return None
        return (self.total - self.done) / self.per_second


class ProgressMeter:
    """Counts the units of one phase and reports them, the first at once and the last always."""

    def __init__(self, phase: str, unit: str, report: Callable[[Progress], None], total: int | None = None):
        self._phase, self._unit, self._report, self._total = phase, unit, report, total
        self._start = time.monotonic()
        self._past = deque([(self._start, 0)])  # (time, units made by then), the first from `_WINDOW` ago
        self.done = self.quarantined = self.skipped = 0
        self._emit()

    def add(self, units: int, quarantined: int = 0, skipped: int = 0) -> None:
        """Count finished units, and report."""
        self.done += units
        self.quarantined += quarantined
        self.skipped += skipped
        self._emit()

    def count(self, items: Iterable[T]) -> Iterator[T]:
        """Pass items through, counting each and reporting twice a second."""
        last = time.monotonic()
        for item in items:
            self.done += 1
            if time.monotonic() - last > _SECONDS_BETWEEN_EVENTS:
                last = time.monotonic()
                self._emit()
            yield item
        self._emit()

    def _emit(self) -> None:
        now, made = time.monotonic(), self.done - self.skipped
        if now - self._past[-1][0] > _SECONDS_BETWEEN_EVENTS:
            self._past.append((now, made))
        while len(self._past) > 1 and self._past[1][0] <= now - _WINDOW:
            self._past.popleft()
        since, before = self._past[0]
        rate = (made - before) / max(now - since, 1e-6)
        counts = self._unit, rate, self.quarantined, self.skipped
        self._report(Progress(self._phase, self.done, self._total, *counts, now - self._start))
