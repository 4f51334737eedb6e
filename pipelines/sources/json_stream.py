"""Reading a JSON list or JSONL file entry by entry, in bounded memory (a LLaVA file is a list of a gigabyte)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

_CHUNK = 1 << 20  # characters read at a time
_LONGEST_ENTRY = 1 << 26  # characters; past this an entry is taken for a file that is not JSON


@dataclass(frozen=True)
class BrokenLine:
    """Stands for a JSONL line that is not JSON."""

    detail: str


def read_entries(text: TextIO, name: str) -> Iterator[object]:
    """Every entry of a JSON list, or of a JSONL file; which of the two it is shows in the first character.

    Args:
        text: the open file.
        name: what errors call the file.

    Raises:
        ValueError: a JSON list is broken. (Nothing after the fault can be trusted; a broken JSONL line is yielded as
            a BrokenLine instead.)
    """
    first = text.read(1)
    while first and (first.isspace() or first == "\ufeff"):
        first = text.read(1)
    if first == "[":
        yield from _list_entries(text, name)
    elif first:
        yield from _line_entries(first, text)


def _line_entries(first: str, text: TextIO) -> Iterator[object]:
    line = first + text.readline()
    while line:
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                yield BrokenLine(f"not a JSON line: {error}")
        line = text.readline()


def _list_entries(text: TextIO, name: str) -> Iterator[object]:
    decoder = json.JSONDecoder()
    buffer, at, count = "", 0, 0
    separator_due = False  # true after an entry: the next character must be a comma or the closing bracket
    while True:
        while at < len(buffer) and buffer[at].isspace():
            at += 1
        if at < len(buffer):
            if buffer[at] == "]":
                return
            if separator_due:
                if buffer[at] != ",":
                    raise ValueError(f"{name}: expected a comma after entry {count - 1}, found {buffer[at]!r}")
                separator_due, at = False, at + 1
                continue
            try:
                entry, end = decoder.raw_decode(buffer, at)
            except ValueError as error:
                if len(buffer) - at > _LONGEST_ENTRY:
                    raise ValueError(f"{name}: entry {count} is not JSON: {error}") from error
            else:
                # Something must follow: a number at the end of the buffer may go on in the next chunk.
                if end < len(buffer):
                    yield entry
                    at, count, separator_due = end, count + 1, True
                    continue
        chunk = text.read(_CHUNK)
        if not chunk:
            raise ValueError(f"{name}: the list ends inside or after entry {count}; is the file cut off?")
        buffer, at = buffer[at:] + chunk, 0
