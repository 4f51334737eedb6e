"""The pages of a Parquet column, from their headers alone: what they claim, before anything is unpacked.

The footer says how many values a column has and how large they are, but a reader goes by each page's own header: a page
of a few kilobytes may claim two gigabytes or two thousand million values, and hold them. A page header is a struct in
Thrift's compact protocol (parquet.thrift in the format's description, `PageHeader`); of it four numbers are needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

_LOOK, _LONGEST = 1 << 12, 1 << 24  # bytes that a header usually has, and may have with the least and greatest value
_SIZE, _PACKED = 2, 3  # fields of PageHeader
_DATA, _DICTIONARY, _DATA_2 = 5, 7, 8  # its structs of each kind of page, whose field 1 is the number of values
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
_DEEPEST = 8


@dataclass(frozen=True)
class Page:
    """What a page claims: bytes unpacked and packed, and values."""

    size: int
    packed: int
    values: int


def pages(file: pa.NativeFile, column: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """The pages of a column in one row group.

    Raises:
        ValueError: a header is none, or its page does not fit into the column.
    """
    start = column.data_page_offset
    if column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    at, end = start, start + column.total_compressed_size
    while at < end:
        page, length = _header(file, at, end)
        if page.size < 0 or page.values < 0 or not 0 <= page.packed <= end - at - length:
            raise ValueError(f"the page at byte {at} claims {page.packed:,} bytes, which do not fit into its column")
        yield page
        at += length + page.packed


def _header(file: pa.NativeFile, at: int, end: int) -> tuple[Page, int]:
    """The header at a place, and its length."""
    look = _LOOK
    while True:
        reader = _Compact(file.read_at(min(look, end - at), at))
        try:
            found = reader.struct(0)
        except IndexError:
            if look >= min(_LONGEST, end - at):
                raise ValueError(f"the page header at byte {at} does not end") from None
            look = _LONGEST
            continue
        kind = next((found[kind] for kind in (_DATA, _DICTIONARY, _DATA_2) if isinstance(found.get(kind), dict)), {})
        numbers = (found.get(_SIZE), found.get(_PACKED), kind.get(1, 0))
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"there is no page header at byte {at}")
        return Page(*numbers), reader.at


class _Compact:
    """Thrift's compact protocol: structs as {field: value}. Raises IndexError at the end of the data."""

    def __init__(self, data: bytes):
        self._data, self.at = data, 0

    def struct(self, depth: int) -> dict[int, object]:
        if depth > _DEEPEST:
            raise ValueError("the page header is nested too deeply")
        found, field = {}, 0
        while (byte := self._byte()) != _STOP:
            field = field + (byte >> 4) if byte >> 4 else self._number()
            kind = byte & 15
            found[field] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> object:
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            byte = self._byte()
            return self._many(self._varint() if byte >> 4 == 15 else byte >> 4, [byte & 15], depth)
        if kind == _MAP:
            count = self._varint()
            return self._many(count, [*divmod(self._byte(), 16)], depth) if count else None
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind in (_DOUBLE, _BINARY):
            return self._skip(8 if kind == _DOUBLE else self._varint())
        if _BYTE < kind < _DOUBLE:
            return self._number()
        raise ValueError(f"the page header has a value of the unknown kind {kind}")

    def _many(self, count: int, kinds: list[int], depth: int) -> None:
        if count > len(self._data):  # each takes a byte at least
            raise IndexError
        if depth > _DEEPEST:
            raise ValueError("the page header is nested too deeply")
        for _ in range(count):
            for kind in kinds:
                self._value(kind, depth + 1)

    def _skip(self, length: int) -> None:
        self.at += length
        if self.at > len(self._data):
            raise IndexError

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value, shift = 0, 0
        while (byte := self._byte()) & 128:
            value, shift = value | (byte & 127) << shift, shift + 7
            if shift > 63:
                raise ValueError("the page header has a number of more than 64 bits")
        return value | byte << shift

    def _number(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
