"""A table of images and captions as a source.

The table is read line by line, so that one bad line costs one record: a quoted field that never ends would else take
all that follows for a caption.
"""

import csv
import io
from collections import deque
from collections.abc import Iterator

from pipelines.sources.annotations import AnnotatedImages
from pipelines.sources.entries import EntryError, captioned, check_path, check_text
from pipelines.sources.source import Record

_LONGEST_ROW = 1000  # lines of one row with line breaks in its quotes


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
            rows = read_rows(text, options)
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
            check_path(self.config.image, values[self.config.image])
            turns = captioned(values[self.config.caption], self.config.prompts, record_id, 1)
            return Record(record_id, self.config.label, [self.locate(values[self.config.image])], turns)
        except EntryError as error:
            return Record(record_id, self.config.label, problem=error.problem)


def read_rows(text: io.TextIOBase, options: dict) -> Iterator[tuple[int, list[str] | str]]:
    """Every row with the number of its first line; where a line is no row, what is wrong with it.

    Args:
        text: the table, opened with newline="".
        options: of csv.reader.
    """
    ahead: deque[str] = deque()  # lines that were read for a row that was none
    number = 1
    while True:
        used: list[str] = []
        try:
            row = next(csv.reader(_lines(text, ahead, used), **options), None)
        except csv.Error as error:
            row = str(error)
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
        line = ahead.popleft() if ahead else text.readline()
        if not line:
            return
        used.append(line)
        yield line
