"""Parquet files with images inside as a source, as Hugging Face datasets writes them.

Listing reads the text columns alone, and of the image column only its small `path` leaf, which says how many images
a row has. The image column is read row group by row group, some rows at a time. A fragment is some row groups, or a
part of a large one, of which the rows before it have to be skipped: in few parts, because each reads it from its start.
"""

import hashlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines import storage
from pipelines.source_config import ParquetSource
from pipelines.sources.entries import EntryError, check_text, one_each, text_turns
from pipelines.sources.files import FileSet, location, parse_location
from pipelines.sources.json_stream import parse_json
from pipelines.sources.parquet_bounds import (
    UNFOLDS,
    Unfolds,
    batch_rows,
    characters,
    check_claims,
    check_pages,
    most_text,
    no_images,
    repeats_long_text,
    texts,
)
from pipelines.sources.source import Fragment, ImageMissing, Problem, Record

_TEXT_ROWS, _IMAGE_ROWS = 1024, 32
_TEXT_BATCH, _IMAGE_BATCH = 2 << 30, 1 << 30  # bytes of a batch, were every value as long as its whole column
_LONGEST_TEXT = 16 << 20  # characters of a value
_BUFFER = 1 << 20
_MOST_PARTS = 16  # of a row group


class Parquet:
    """Reader of a `ParquetSource`. Images are read quickest in the order of the rows."""

    def __init__(self, config: ParquetSource):
        self.config = config
        self._files = FileSet(config.files)
        self._file: tuple[str, pq.ParquetFile] | None = None
        self._rows: _ImageRows | None = None

    def records(self) -> Iterator[Record]:
        """One record per row. A file or row group that cannot be read is one record with a problem.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file lacks a column that the config names.
        """
        for name in self._files.names():
            yield from self._list(name)

    def units(self) -> list[str]:
        """The files. Raises FileNotFoundError."""
        return self._files.names()

    def cut(self, unit: str, size: int) -> Iterator[Fragment]:
        """Cut by rows, as the footer has them. A file without one is a fragment. Raises ValueError as `records`."""
        facts = self._files.facts(unit)
        try:
            with self._parquet(unit) as file:
                self._columns(unit, file)
                groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                for i in range(file.num_row_groups):
                    check_claims(file.metadata.row_group(i), [], self._files.size(unit))
                lists = self.config.caption is not None and not texts(file, [self.config.caption])
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError, Unfolds):
            groups, lists = [], True
        start = stop = 0
        for rows in groups:
            if stop + rows - start > size and stop > start:
                yield self._fragment(unit, start, stop, facts, lists)
                start = stop
            step = max(size, -(-rows // _MOST_PARTS))
            while stop + rows - start > step:
                yield self._fragment(unit, start, start + step, facts, lists)
                rows -= start + step - stop
                start = stop = start + step
            stop += rows
        if stop > start or not groups:
            yield self._fragment(unit, start, stop, facts, lists)

    @staticmethod
    def _fragment(unit: str, start: int, stop: int, facts: str, lists: bool) -> Fragment:
        digest = hashlib.sha256(f"{facts} {start} {stop}".encode()).hexdigest()
        return Fragment(unit, start, stop, first=start, records=None if lists else stop - start, digest=digest)

    def read(self, fragment: Fragment) -> Iterator[Record]:
        """The records of some rows."""
        if fragment.stop == 0:
            return self._list(fragment.unit)
        return self._list(fragment.unit, fragment.start, fragment.stop)

    def read_image(self, location: str) -> bytes:
        """The encoded image."""
        name, group, row, index = parse_location(location)
        if self._file is None or self._file[0] != name:
            self._file, self._rows = (name, self._parquet(name)), None
        if self._rows is None or self._rows.group != group or row < self._rows.first:
            self._check_images(name, group)
            self._rows = _ImageRows(self._file[1], group, self.config.image)
        return self._rows.image(row, int(index))

    def _check_images(self, name: str, group: int) -> None:
        """Raise ValueError where the pages of the image column unfold without bounds.

        On a local disk only: from an object store every page would be one request more.
        """
        if isinstance(self._files.filesystem, fs.LocalFileSystem):
            facts = self._file[1].metadata.row_group(group)
            with self._open(name) as raw:
                check_pages(raw, facts, [*_leaves(self._file[1], self.config.image)], self._files.size(name))

    def fingerprint(self) -> str:
        """Digest of the files' names, sizes and times of change."""
        return self._files.fingerprint()

    def _open(self, name: str) -> pa.NativeFile:
        return storage.open_input(self._files.filesystem, self._files.path(name))

    def _parquet(self, name: str, *repeated: str) -> pq.ParquetFile:
        """The open file. Of the columns `repeated`, a value that many rows share is kept once."""
        source = self._open(name)
        return pq.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False, read_dictionary=list(repeated) or None)

    def _list(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The records of rows `start` to `stop` of a file, all by default. Damage is told where it begins."""
        try:
            file = self._parquet(name)
            columns = self._columns(name, file)
            file = self._parquet(name, *texts(file, columns))
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            yield self._damaged(name, "", error)
            return
        with file, self._open(name) as raw:
            size, behind = self._files.size(name), 0
            for group in range(file.num_row_groups):
                before, behind = behind, behind + file.metadata.row_group(group).num_rows
                if (behind <= start and behind > before) or (stop is not None and before >= stop):
                    continue
                row, unfolded = 0, 0
                try:
                    check_claims(file.metadata.row_group(group), columns, size)
                    check_pages(raw, file.metadata.row_group(group), columns, size)
                    rows = batch_rows(file, group, columns, _TEXT_ROWS, _TEXT_BATCH)
                    for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                        skipped = min(max(start - before - row, 0), len(batch))
                        row += skipped
                        for values in _rows(batch.slice(skipped)):
                            if stop is not None and before + row >= stop:
                                return
                            unfolded += characters(values)
                            if unfolded > most_text(size):
                                raise ValueError(f"its text is over {UNFOLDS:,} times as long as the file")
                            yield from one_each(self._record(name, group, row, values), self.config)
                            row += 1
                except (pa.ArrowInvalid, OSError, ValueError) as error:
                    if before + row < start or (stop is not None and before + row >= stop):
                        continue
                    facts = file.metadata.row_group(group)
                    bytes_ = sum(facts.column(i).total_compressed_size for i in range(facts.num_columns))
                    share = (facts.num_rows - row) / max(facts.num_rows, 1)
                    where = f"[row group {group} from row {row}]"
                    yield self._damaged(name, where, error, int(bytes_ * share))

    def _damaged(self, name: str, part: str, error: Exception, lost: int | None = None) -> Record:
        """The record for what cannot be read of a file: `lost` bytes, or all of it, which may be cut off."""
        # A store that does not answer is no damage: then this read fails as well, and the run with it.
        with self._open(name) as file:
            file.read_at(1, 0)
        detail = f"{name}{part}: {error}; its rows are lost, write the file again"
        whole, of = self._files.lost(name, 0, cut=lost is None)
        problem = Problem("shard_damaged", detail, whole if lost is None else max(lost, 1), of)
        return Record(f"{name}{part or '[damaged]'}", self.config.label, problem=problem)

    def _columns(self, name: str, file: pq.ParquetFile) -> list[str]:
        """What listing reads, by parquet's names."""
        config = self.config
        named = [config.conversation, config.question, config.answer, config.caption, config.id]
        for column in filter(None, [*named, config.image]):
            if column not in file.schema_arrow.names:
                has = ", ".join(file.schema_arrow.names)
                raise ValueError(f"source {config.label!r}: {name} has no column {column!r}, its columns are {has}")
        if config.image:
            problem = no_images(file.schema_arrow.field(config.image).type)
            if problem:
                raise ValueError(
                    f"source {config.label!r}: column {config.image} of {name} holds {problem}, expected encoded "
                    "images: {bytes, path}, binary, or a list of either. Name the column that has them, or embed them"
                )
        return [*filter(None, named), *([_leaves(file, config.image)[1]] if config.image else [])]

    def _record(self, name: str, group: int, row: int, values: dict | UnicodeDecodeError) -> Record:
        record_id = f"{name.removesuffix('.parquet')}/{group}/{row}"
        try:
            if isinstance(values, UnicodeDecodeError):
                raise EntryError(f"the row has text that is not valid Unicode: {values}")
            longest = max((len(value) for value in values.values() if isinstance(value, str)), default=0)
            if longest > _LONGEST_TEXT:
                raise EntryError(f"the row has a text of {longest:,} characters, over the limit of {_LONGEST_TEXT:,}")
            if self.config.id is not None:
                own = values[self.config.id]
                if not isinstance(own, str | int) or own == "":
                    raise EntryError(f"{self.config.id} is {own!r}, expected a string")
                record_id = str(own)
            check_text("the id", record_id)
            images = [location(name, group, row, str(i)) for i in range(self._images(values))]
            if self.config.conversation is not None:
                values[self.config.conversation] = _parsed(values[self.config.conversation])
            turns = text_turns(self.config, values.get, record_id, len(images))
            return Record(record_id, self.config.label, images, turns)
        except EntryError as error:
            return Record(record_id, self.config.label, problem=error.problem)

    def _images(self, values: dict) -> int:
        """How many images a row has. Raises EntryError where it lacks the one that it should have."""
        if self.config.image is None:
            return 0
        cells = values[self.config.image]
        count = len(cells) if isinstance(cells, list) else int(cells is not None)
        told_empty = cells is not None and self.config.conversation is not None
        if not count and not told_empty and not self.config.text_only:
            what = "null" if cells is None else "empty"
            raise EntryError(f"column {self.config.image} is {what}; text_only: true takes such rows", "image_missing")
        return count


class _ImageRows:
    """The image column of one row group, read forwards."""

    def __init__(self, file: pq.ParquetFile, group: int, column: str):
        self.group, self.first = group, 0
        columns = sorted({*_leaves(file, column)})
        rows = batch_rows(file, group, columns, _IMAGE_ROWS, _IMAGE_BATCH)
        self._batches = file.iter_batches(rows, row_groups=[group], columns=columns)
        self._rows: pa.Array = pa.array([])

    def image(self, row: int, index: int) -> bytes:
        """An image of a row that is not before the current batch."""
        while row >= self.first + len(self._rows):
            self.first += len(self._rows)
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(f"the row group has no row {row}: the file was changed since it was listed")
            self._rows = batch.column(0)
        value = self._rows[row - self.first].as_py()
        image = value[index] if isinstance(value, list) else value
        data = image.get("bytes") if isinstance(image, dict) else image
        if data is None:
            where = image.get("path") if isinstance(image, dict) else None
            has = "a path and no bytes" if where else "no bytes"
            raise ImageMissing(f"row {row} has {has} of image {index}: embed the images in the file")
        return data


def _leaves(file: pq.ParquetFile, column: str) -> tuple[str, str]:
    """The leaf of an image column with the bytes, and a small one that has as many values where there is one."""
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    leaves = [path for path in paths if path == column or path.startswith(f"{column}.")]
    content = next((path for path in leaves if path.endswith(".bytes")), leaves[0])
    return content, next((path for path in leaves if path != content), content)


def _rows(batch: pa.RecordBatch) -> Iterator[dict | UnicodeDecodeError]:
    """The rows as Python values; of one whose text is not Unicode, the error."""
    if batch.num_rows > 1 and any(map(repeats_long_text, batch.columns)):
        yield from (row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1)))
        return
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield error
        else:
            yield from (row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1)))


def _parsed(conversation: object) -> object:
    """A conversation, which may be stored as JSON text. Raises EntryError."""
    if not isinstance(conversation, str):
        return conversation
    try:
        return parse_json(conversation)
    except ValueError as error:
        raise EntryError(f"the conversation is not JSON: {error}") from error
