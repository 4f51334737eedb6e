"""Progress of a preparation, as plain events."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_SECONDS_BETWEEN_EVENTS = 0.5


@dataclass(frozen=True)
class Progress:
    """How far a phase is."""

    phase: str
    """In this order: "tokenizer", "records" (listing them), "tokenize", "pack", "finished"."""
    done: int
    total: int | None
    """None while it is not known how many there are."""
    unit: str
    """What is counted: "records" or "rows"."""
    per_second: float = 0.0
    """Units per second since the phase began; skipped ones not counted."""
    quarantined: int = 0
    """Records set aside so far in this phase."""
    skipped: int = 0
    """Units of `done` that an earlier run had done."""


class ProgressMeter:
    """Counts the units of one phase and reports them, the first at once and the last always."""

    def __init__(self, phase: str, unit: str, report: Callable[[Progress], None], total: int | None = None):
        self._phase, self._unit, self._report, self._total = phase, unit, report, total
        self._start = time.monotonic()
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
        seconds = max(time.monotonic() - self._start, 1e-6)
        rate = (self.done - self.skipped) / seconds
        self._report(Progress(self._phase, self.done, self._total, self._unit, rate, self.quarantined, self.skipped))
