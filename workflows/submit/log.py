"""A job's log as the client reads it: lines fit for a terminal, and the one line that holds the result.

Anything may stand in a log: what a model answers, what a library prints of a record. None of it may pass for the result
or reach the terminal as more than text.
"""

import json
import re
from collections.abc import Callable, Mapping

from workflows.console import printable

RESULT = "mlmamba-result "
"""Begins the line of the log that holds the result, the text for a person included, as JSON. The job's mark follows."""
MARK = "MLMAMBA_MARK"
"""Variable, and entry of the metadata, with a job's mark: random, so that no text in a log passes for the result."""
STARTED = "Running entrypoint for job "
"""Begins the line that Ray logs when it starts the job's process. Ray may flush it late, so that output of a quick
process can stand before it."""
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_RAYS = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\s+[A-Z]+ \w+\.py:\d+ -- ")
"""Begins Ray's own lines about setting up the job's environment, which come before the job's."""


def result_prefix(marks: Mapping[str, str]) -> str:
    """What begins the line with the result of a job, from its variables or its metadata.

    Jobs of clients up to 0.1 have no mark.
    """
    mark = marks.get(MARK)
    return f"{RESULT}{mark} " if mark else RESULT


def for_terminal(line: str) -> str:
    """A line from a job's log for this terminal: without colours, other control characters written out."""
    return "    ".join(printable(part) for part in _COLOURS.sub("", line).rstrip("\r").split("\t"))


class Reader:
    """Split pieces of a log into lines and show them; keep the line with the result apart.

    Lines before the job's start are held back until it starts, so that Ray's own lines can be left out.

    Args:
        show: told each line, fit for a terminal.
        marks: the job's metadata. A line that looks like a result without the job's mark is shown like any other.
    """

    def __init__(self, show: Callable[[str], None], marks: Mapping[str, str]):
        self._show, self._rest = lambda line: show(for_terminal(line)), ""
        self._prefix = result_prefix(marks)
        self._before: list[str] | None = []
        self.result: dict | None = None

    def feed(self, text: str) -> None:
        """Take the next piece of the log."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)

    def close(self) -> None:
        """End the log: show the last line, and what was held back."""
        if self._rest:
            self._line(self._rest)
        self._rest = ""
        self._begin()

    def _line(self, line: str) -> None:
        if line.startswith(STARTED) and self._before is not None:
            self._begin()
        elif (result := self._result(line)) is not None:
            self.result = result
        elif self._before is not None:
            self._before.append(line)
        else:
            self._show(line)

    def _result(self, line: str) -> dict | None:
        """The result in a line, or None where it holds none."""
        if not line.startswith(self._prefix):
            return None
        try:
            result = json.loads(line.removeprefix(self._prefix))
        except (ValueError, RecursionError):
            return None
        return result if isinstance(result, dict) else None

    def _begin(self) -> None:
        for line in self._before or ():
            if not _RAYS.match(line):
                self._show(line)
        self._before = None
