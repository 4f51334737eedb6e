"""Where a JSON list or JSONL file can be cut into fragments, found from its bytes alone.

Entries are not parsed: of a list, brackets, commas and quotation marks show where they end, of lines the line breaks.
That is some ten times as fast. What is not plain (a list that does not close, line breaks of old Macs) is
`Unclear`: the file is then listed entry by entry, which also finds the words for what is wrong with it.
"""

import hashlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from pipelines.sources.source import Fragment

LIST, LINES = "list", "lines"
LARGEST = 64 << 20  # bytes of a fragment of more than one entry
_CHUNK = 1 << 22
_SHORT = 1 << 12  # bytes of a line that is looked at whole
_SPACE = b" \t\r\n\v\f"
_BOM = b"\xef\xbb\xbf"
_OPEN, _CLOSE, _COMMA, _QUOTE = b"[{", b"]}", ord(","), ord('"')
_MARKS = np.isin(np.arange(256), [*_OPEN, *_CLOSE, _COMMA])
_STEP = np.where(np.isin(np.arange(256), [*_OPEN]), 1, np.where(np.isin(np.arange(256), [*_CLOSE]), -1, 0))
# First bytes of a line that may be white space alone, other than those of one that begins with text.
_MAYBE_SPACE = np.isin(np.arange(256), [*_SPACE, 0x1C, 0x1D, 0x1E, 0x1F, 0xC2, 0xE1, 0xE2, 0xE3])


class Unclear(Exception):
    """The file cannot be cut by its bytes."""


def cut_json(stream: BinaryIO, size: int, limit: int | None) -> list[Fragment]:
    """The fragments of a file, each of at most `size` entries; `unit` says whether it is a list or lines.

    Args:
        stream: the open file.
        size: entries of a fragment.
        limit: what comes after so many entries is not looked at.

    Raises:
        Unclear: see the module's text.
    """
    start = len(_BOM) if (head := stream.read(_CHUNK)).startswith(_BOM) else 0
    while start == len(head) or head[start] in _SPACE:
        if start == len(head):
            if not (more := stream.read(_CHUNK)):
                return []
            head += more
            continue
        start += 1
    if head[start] == ord("["):
        return _cut_list(stream, head, start + 1, size, limit)
    return _cut_lines(stream, head, size, limit)


class _Fragments:
    """What is made of the entries that were seen."""

    def __init__(self, unit: str, size: int, start: int, behind: int):
        self.unit, self._size, self._start, self._behind = unit, size, start, behind
        self.made: list[Fragment] = []
        self.first = self.entries = 0
        self._line = self._column = 1
        self._here = (1, 1)
        self._digest = hashlib.blake2b(digest_size=16)

    def pass_over(self, data: bytes) -> None:
        """Count lines and columns of what stands before the first entry."""
        self._move(data)
        self._here = self._line, self._column

    def take(self, data: bytes, offset: int, ends: np.ndarray) -> None:
        """Take the next bytes of the file; `ends` are the places in them behind each entry and its separator."""
        used = taken = 0
        while len(ends) - taken >= self._size - self.entries:
            taken += self._size - self.entries
            self.entries = self._size
            used = self._cut(data, used, int(ends[taken - 1]), offset)
        self.entries += len(ends) - taken
        if len(ends) > taken and offset + int(ends[-1]) - self._start > LARGEST:
            used = self._cut(data, used, int(ends[-1]), offset)
        self._use(data[used:])

    def finish(self, stop: int) -> list[Fragment]:
        """The last fragment ends at `stop`."""
        if self.entries:
            self._add(stop)
        return self.made

    def count(self) -> int:
        """Entries so far."""
        return self.first + self.entries

    def _cut(self, data: bytes, used: int, end: int, offset: int) -> int:
        self._use(data[used:end])
        self._add(offset + end - self._behind)
        self._start, self._here = offset + end, (self._line, self._column)
        self._digest = hashlib.blake2b(digest_size=16)
        return end

    def _add(self, stop: int) -> None:
        digest, (line, column) = self._digest.hexdigest(), self._here
        self.made.append(Fragment(self.unit, self._start, stop, self.first, line, column, self.entries, digest))
        self.first, self.entries = self.first + self.entries, 0

    def _use(self, data: bytes) -> None:
        self._digest.update(data)
        self._move(data)

    def _move(self, data: bytes) -> None:
        newlines = int(np.count_nonzero(np.frombuffer(data, np.uint8) == 10))  # a fifth of the time of bytes.count
        if newlines:
            self._line, self._column = self._line + newlines, 1
            data = data[data.rindex(b"\n") + 1 :]
        follow = (np.frombuffer(data, np.uint8) & 0xC0) == 0x80  # bytes of a character behind its first
        self._column += len(data) - int(np.count_nonzero(follow))


def _chunks(stream: BinaryIO, head: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """The rest of a file from `at` on, with the place of each piece; none ends within an escape or a line break."""
    data = head[at:]
    while data or (data := stream.read(_CHUNK)):
        while data.endswith(b"\r") or (len(data) - len(data.rstrip(b"\\"))) % 2:
            if not (more := stream.read(1)):
                break
            data += more
        if b"\r" in data and data.count(b"\r") != data.count(b"\r\n"):
            raise Unclear
        yield at, data
        at, data = at + len(data), b""


def _cut_list(stream: BinaryIO, head: bytes, start: int, size: int, limit: int | None) -> list[Fragment]:
    found = _Fragments(LIST, size, start, behind=1)
    found.pass_over(head[:start].removeprefix(_BOM))
    depth, inside, filled = 1, 0, False  # filled: something stands behind the last comma
    chunks = _chunks(stream, head, start)
    for at, data in chunks:
        plain = data.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in data else data
        values = np.frombuffer(plain, np.uint8)
        quotes = np.flatnonzero(values == _QUOTE)
        marks = np.flatnonzero(_MARKS[values])
        marks = marks[(np.searchsorted(quotes, marks) + inside) % 2 == 0]
        kinds = values[marks]
        depths = depth + np.cumsum(_STEP[kinds])
        closed = np.flatnonzero(depths == 0)
        if closed.size:
            last = int(closed[0])
            ends = marks[:last][(depths[:last] == 1) & (kinds[:last] == _COMMA)] + 1
            close = int(marks[last])
            filled = bool(data[ends[-1] if ends.size else 0 : close].strip(_SPACE)) or (filled and not ends.size)
            found.take(data[:close], at, ends)
            found.entries += filled
            rest = data[close + 1 :]
            while limit is None or found.count() < limit:  # nobody asks for what comes after it
                if rest.strip(_SPACE):
                    raise Unclear
                if not (rest := stream.read(_CHUNK)):
                    break
            return found.finish(at + close)
        ends = marks[(depths == 1) & (kinds == _COMMA)] + 1
        filled = bool(data[ends[-1] if ends.size else 0 :].strip(_SPACE)) or (filled and not ends.size)
        found.take(data, at, ends)
        if limit is not None and found.first >= limit:
            return found.made
        depth = int(depths[-1]) if marks.size else depth
        inside = (inside + len(quotes)) % 2
    raise Unclear


def _cut_lines(stream: BinaryIO, head: bytes, size: int, limit: int | None) -> list[Fragment]:
    found = _Fragments(LINES, size, 0, behind=0)
    begun, begins, at, data = False, True, 0, head  # begun: the line so far has text
    while data:
        if data.endswith(b"\r"):
            data += stream.read(1)
        if b"\r" in data and data.count(b"\r") != data.count(b"\r\n"):
            raise Unclear
        values = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(values == 10) + 1
        kept = data[int(ends[-1]) if ends.size else 0 :]
        if kept and len(kept) < _SHORT and _MAYBE_SPACE[kept[0]] and (more := stream.read(_CHUNK)):
            data += more  # a character may stand in two pieces
            continue
        starts = np.concatenate([[0], ends])[: len(ends)].astype(np.int64)
        full = ~_MAYBE_SPACE[values[starts]]
        for i in np.flatnonzero(~full).tolist():
            full[i] = not _is_space(data[starts[i] : ends[i]])
        if ends.size:
            full[0] = begun or (full[0] if begins else not _is_space(data[: ends[0]]))
        found.take(data, at, ends[full])
        if limit is not None and found.first >= limit:
            return found.made
        tail = data[int(ends[-1]) if ends.size else 0 :]
        begun = (begun and not ends.size) or not _is_space(tail)
        begins = not tail
        at, data = at + len(data), stream.read(_CHUNK)
    found.entries += begun
    return found.finish(at)


def _is_space(line: bytes) -> bool:
    text = line.removeprefix(_BOM).decode("utf-8", "surrogateescape")
    return not text or text.isspace()
