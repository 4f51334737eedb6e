"""What a person sees while work goes on: steps, progress and notes, all on stderr; results alone go to stdout."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from pipelines.progress import Progress
from workflows.errors import one_stop

_SECONDS_BETWEEN_LINES = 5.0


def printable(text: str) -> str:
    """Text from outside for one line of a terminal: control characters and what no encoding holds are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class Console:
    """Prints steps and progress. On a terminal a progress line redraws itself; in a file it appears every 5 s."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._pending = ""
        self._last = 0.0
        self.phases: dict[str, dict] = {}
        """The last event of each phase of the preparation."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step and, when it ends, how long it took."""
        start = time.monotonic()
        self.line(f"== {name}")
        yield
        self._settle()
        self.line(f"   {time.monotonic() - start:.0f} s")

    def line(self, text: str) -> None:
        """One line that stays."""
        self._settle()
        print(one_stop(text), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """One indented line that stays."""
        self.line(f"   {text}")

    def progress(self, text: str, last: bool = False) -> None:
        """The current state of what is going on; replaces the one before."""
        now = time.monotonic()
        if self._live:
            print(f"\r\x1b[2K   {text}", end="", file=self._stream, flush=True)
            self._pending = text
            if last:
                self._settle()
        elif last or now - self._last >= _SECONDS_BETWEEN_LINES:
            print(f"   {text}", file=self._stream, flush=True)
            self._last = now

    def _settle(self) -> None:
        if self._pending:
            print(file=self._stream, flush=True)
            self._pending = ""

    def preparation(self, progress: Progress) -> None:
        """Progress of the data preparation."""
        if progress.phase == "finished":
            self._settle()
            return
        if not progress.unit:
            self.note(f"{progress.phase} ...")
            return
        self.phases[progress.phase] = asdict(progress)
        if progress.total is None and not progress.done:
            return
        total = "" if progress.total is None else f"/{progress.total:,}"
        parts = [f"{progress.phase}: {progress.done:,}{total} {progress.unit}"]
        last = progress.done == progress.total
        if progress.per_second:
            parts.append(f"{progress.per_second:,.0f}/s")
        if last:
            parts.append(f"in {duration(progress.seconds)}")
        elif progress.seconds_left is not None:
            parts.append(f"{duration(progress.seconds_left)} left")
        if progress.quarantined:
            parts.append(f"{progress.quarantined:,} quarantined")
        if progress.skipped:
            parts.append(f"{progress.skipped:,} done before")
        self.progress(", ".join(parts), last)

    def training(self, event: dict) -> None:
        """An event of a training stage."""
        kind = event.get("event")
        if kind == "metrics":
            left = (event["steps"] - event["step"]) * event["seconds_per_step"]
            self.progress(
                f"step {event['step']}/{event['steps']}  loss {event['loss']:.3f}  lr {event['learning_rate']:.1e}  "
                f"{event['tokens_per_second']:,.0f} tokens/s  {left:.0f} s left",
                last=event["step"] == event["steps"],
            )
        elif kind == "start":
            self.note(event["text"])
            if event["step"]:
                self.note(f"going on from the checkpoint of step {event['step']} of {event['steps']}")
        elif kind in ("failure", "note"):
            self.note(event["text"])


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min 30 s, 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
