"""A table of images and captions as a source.

The table is read line by line, so that one bad line costs one record: a quoted field that never ends would else take
all that follows for a caption.
"""

import csv
import io
from collections import deque
from collections.abc import Iterator

from pipelines import storage
from pipelines.sources.annotations import AnnotatedImages
from pipelines.sources.entries import EntryError, captioned, check_path, check_text
from pipelines.sources.json_buffer import refuse_utf16
from pipelines.sources.source import Record

_LONGEST_ROW = 1000  # lines of one row with line breaks in its quotes
_LONGEST_LINE = 1 << 20  # characters


class Captions(AnnotatedImages):
    """Reader of a `CaptionsSource`."""

    PATH_FIELD = "table"

    def records(self) -> Iterator[Record]:
        """One record per row, in the table's order.

        Raises:
            FileNotFoundError: no table.
            ValueError: a column that the config names is not there.
        """
        tabs = self.config.table.partition("?")[0].removesuffix(".gz").endswith(".tsv")
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
        with self.open_text() as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
            first = _line(text)
            refuse_utf16(first[:4], storage.shown(self.config.table))
            rows = read_rows(text, options, first)
            columns = self.config.columns
            if columns is None:
                _, columns = next(rows, (1, []))
            self._check(columns)
            for line, row in rows:
                yield self._record(line, row, columns)

    def _check(self, columns: list[str] | str) -> None:
        for name in (self.config.image, self.config.caption, self.config.id):
            if name is not None and (isinstance(columns, str) or name not in columns):
                raise ValueError(
                    f"source {self.config.label!r}: the table has no column {name!r}, its columns are {columns}; "
                    "check image, caption, id and columns"
                )

    def _record(self, line: int, row: list[str] | str, columns: list[str]) -> Record:
        record_id = f"{self.config.label}[{line}]"
        try:
            if isinstance(row, str):
                raise EntryError(f"line {line}: {row}")
            if len(row) != len(columns):
                raise EntryError(f"line {line} has {len(row)} columns, the table has {len(columns)}")
            values = dict(zip(columns, row, strict=True))
            if self.config.id is not None:
                check_text(self.config.id, values[self.config.id])
                if not values[self.config.id]:
                    raise EntryError(f"line {line} has no {self.config.id}")
                record_id = values[self.config.id]
            path = self.relative(values[self.config.image])
            check_path(self.config.image, path)
            turns = captioned(values[self.config.caption], self.config.prompts, record_id, 1)
            return Record(record_id, self.config.label, [self.locate(path)], turns)
        except EntryError as error:
            return Record(record_id, self.config.label, problem=error.problem)


def read_rows(text: io.TextIOBase, options: dict, first: str = "") -> Iterator[tuple[int, list[str] | str]]:
    """Every row with the number of its first line; where a line is no row, what is wrong with it.

    Args:
        text: the table, opened with newline="".
        options: of csv.reader.
        first: the first line, where it was read already.
    """
    ahead: deque[str] = deque([first] if first else [])  # lines that were read for a row that was none
    number = 1
    while True:
        used: list[str] = []
        try:
            row = next(csv.reader(_lines(text, ahead, used), **options), None)
        except csv.Error as error:
            row = f"more than {_LONGEST_LINE:,} characters" if used[0] == _TOO_LONG else str(error)
            ahead.extendleft(reversed(used[1:]))
            used = used[:1]
        if row is None:
            return
        if row:
            yield number, row
        number += len(used)


def _lines(text: io.TextIOBase, ahead: deque[str], used: list[str]) -> Iterator[str]:
    """Lines for one row."""
    while len(used) < _LONGEST_ROW:
        line = ahead.popleft() if ahead else _line(text)
        if not line:
            return
        used.append(line)
        if line == _TOO_LONG:
            raise csv.Error("a line of the row is too long")
        yield line


def _line(text: io.TextIOBase) -> str:
    """The next line with its end, "" at the end of the file; `_TOO_LONG` stands for one that was left out."""
    line = text.readline(_LONGEST_LINE)
    if len(line) < _LONGEST_LINE or line.endswith(("\n", "\r")):
        return line
    while len(rest := text.readline(_LONGEST_LINE)) == _LONGEST_LINE and not rest.endswith(("\n", "\r")):
        pass
    return _TOO_LONG


_TOO_LONG = "\0"  # no line of a text: its end is missing
