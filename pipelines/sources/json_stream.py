"""Reading a JSON list or JSONL file entry by entry, in bounded memory (a LLaVA file is a list of a gigabyte).

An entry that JSON allows and Python does not read (nested a thousand deep, an integer of 4,300 digits) and one of more
than `json_buffer.LONGEST_ENTRY` characters cost themselves alone. What is not JSON ends a list, because nothing after
it can be trusted, and of lines costs the line.
"""

import json
from collections.abc import Iterator
from typing import TextIO

from pipelines.sources import json_buffer
from pipelines.sources.json_buffer import DECODER, SPACE, BrokenLine, Buffer, unread
from pipelines.sources.json_cut import LIST
from pipelines.sources.source import Fragment

_LOOK = 1 << 16  # characters that show whether a file that starts with { is one object
_KEYS = 20  # of an object that an error names
_LAYOUTS = (
    ({"images", "annotations"}, "; captions in COCO's layout are read by type: coco_captions"),
    ({"questions"}, "; VQAv2's questions and annotations are read by type: vqav2"),
)


def read_entries(text: TextIO, name: str) -> Iterator[object]:
    """Every entry of a JSON list, or of a JSONL file; which of the two it is shows in the first character.

    Args:
        text: the open file, bytes that are not UTF-8 as lone surrogates.
        name: what errors call the file.

    Yields:
        Entries, and a `BrokenLine` for each that cannot be read.

    Raises:
        ValueError: a JSON list is broken or something follows it, the file is one JSON object, or it is UTF-16.
    """
    buffer = Buffer(text, name)
    first = buffer.next()
    if first == "[":
        yield from _list_entries(buffer)
        more = buffer.next()
        if more:
            raise ValueError(
                f"{name}: the list ends and {more!r} follows at {buffer.place()}: a file holds one list; write the "
                "lists into one, or each into a file of its own"
            )
    elif first:
        if first == "{":
            _refuse_object(buffer)
        yield from _line_entries(buffer)


def read_part(text: TextIO, name: str, part: Fragment) -> Iterator[object]:
    """The entries of a fragment that `json_cut.cut_json` made; of a list, its text stands in brackets. As above."""
    in_list = part.unit == LIST
    buffer = Buffer(text, name, (part.line, part.column - in_list))
    return _list_entries(buffer, part.first) if in_list else _line_entries(buffer)


def read_member(text: TextIO, name: str, member: str) -> Iterator[object]:
    """Every entry of a list that stands under a key of the JSON object that the file is. As `read_entries`.

    Raises:
        ValueError: also where the object has no such list.
    """
    buffer = Buffer(text, name)
    if buffer.next() != "{":
        raise ValueError(f"{name} is not one JSON object with a list {member!r}")
    keys = []
    for key in _members(buffer):
        keys.append(key)
        if key == member:
            if buffer.next() != "[":
                raise ValueError(f"{name}: {member!r} is not a list, at {buffer.place()}")
            yield from _list_entries(buffer)
            return
        buffer.skip_value()
    raise ValueError(f"{name} has no list {member!r}, its keys are {', '.join(keys[:_KEYS])}")


def object_keys(text: TextIO, name: str) -> list[str]:
    """The keys of the JSON object that a file is, [] for a list or an entry per line. Raises ValueError for UTF-16."""
    buffer = Buffer(text, name)
    if buffer.next() != "{":
        return []
    keys = []
    try:
        for key in _members(buffer):
            keys.append(key)
            buffer.skip_value()
    except ValueError:
        return []
    buffer.at += 1
    return [] if buffer.next() else keys


def parse_json(text: str) -> object:
    """The value of a whole JSON text. Raises ValueError that says what is wrong, also of what Python does not read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise ValueError(f"the JSON {unread(error)}") from error


def _line_entries(buffer: Buffer) -> Iterator[object]:
    while buffer.next():
        number = buffer.line()
        line = buffer.take_line()
        if line is None:
            yield BrokenLine(f"line {number} has more than {json_buffer.LONGEST_ENTRY:,} characters")
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            yield BrokenLine(f"line {number} is not JSON: {error.msg} at column {error.colno}")
        except (RecursionError, ValueError) as error:
            yield BrokenLine(f"line {number} {unread(error)}")


def _refuse_object(buffer: Buffer) -> None:
    """Raise ValueError for a file that is one object over several lines; of JSONL, every line starts with its own."""
    while len(buffer.buffer) - buffer.at < _LOOK and buffer.more():
        pass
    end = buffer.buffer.find("\n", buffer.at)
    whole = end < 0 or bool(buffer.buffer[buffer.at : end].strip())
    following = SPACE.sub("", buffer.buffer[end : end + 100]) if end >= 0 else ""
    try:
        DECODER.raw_decode(buffer.buffer, buffer.at)
    except json.JSONDecodeError:
        pass
    except (RecursionError, ValueError):
        return
    else:
        inside = DECODER.raw_decode(buffer.buffer, buffer.at)[1]
        if end < 0 or inside <= end:
            return
        following = following or "..."
    if end < 0 and not buffer.ended:  # one long line: whether more follows is not known yet
        return
    if whole and (not following or following.startswith("{")):
        return
    keys = []
    try:
        for key in _members(buffer):
            keys.append(key)
            buffer.skip_value()
    except ValueError:
        pass
    raise ValueError(one_object(buffer.name, keys))


def one_object(name: str, keys: list[str]) -> str:
    """The message about a file that is one JSON object, and what reads it where that is known."""
    hint = next((hint for has, hint in _LAYOUTS if has <= {*keys}), "")
    has = ", ".join(keys[:_KEYS])
    return f"{name} is one JSON object with keys {has}, expected a list of entries or an entry per line{hint}"


def _members(buffer: Buffer) -> Iterator[str]:
    """The keys of an object, each with its value next in the buffer; who asks has to use or skip it."""
    buffer.at += 1
    while (mark := buffer.next()) != "}":
        if mark == ",":
            buffer.at += 1
            continue
        key = buffer.value("a key")
        if not isinstance(key, str) or buffer.next() != ":":
            raise ValueError(f"{buffer.name} is not JSON at {buffer.place()}: expected a key and a colon")
        buffer.at += 1
        yield key


def _list_entries(buffer: Buffer, count: int = 0) -> Iterator[object]:
    """The entries of a list that begins with the next character; `count` is the first one's number."""
    buffer.at += 1
    separator_due = False  # true after an entry: the next character must be a comma or the closing bracket
    while True:
        mark = buffer.next()
        if not mark:
            raise ValueError(f"{buffer.name}: the list ends inside or after entry {count}; is the file cut off?")
        if mark == "]":
            buffer.at += 1
            return
        if separator_due:
            if mark != ",":
                where = buffer.place()
                raise ValueError(f"{buffer.name}: expected a comma after entry {count - 1} at {where}, found {mark!r}")
            buffer.at, separator_due = buffer.at + 1, False
            continue
        yield buffer.value(f"entry {count}")
        count, separator_due = count + 1, True
