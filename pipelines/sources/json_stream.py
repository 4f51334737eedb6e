"""Reading a JSON list or JSONL file entry by entry, in bounded memory (a LLaVA file is a list of a gigabyte).

An entry that JSON allows and Python does not read (nested a thousand deep, an integer of 4,300 digits) and one of more
than `LONGEST_ENTRY` characters cost themselves alone. What is not JSON ends a list, because nothing after it can be
trusted, and of lines costs the line.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

_CHUNK = 1 << 20  # characters read at a time
LONGEST_ENTRY = 1 << 26  # characters of an entry that is read
_UNSURE = 16  # characters before the end of what was read in which an error may only mean that more follows
_BEHIND_NUMBER = tuple(",]} \t\r\n")
_LOOK = 1 << 16  # characters that show whether a file that starts with { is one object
_KEYS = 20  # of an object that an error names
_MARK, _STRING_MARK = re.compile(r'["\[\]{},]'), re.compile(r'["\\]')
_SPACE = re.compile(r"\s+")
_UTF16 = ("\udcff\udcfe", "\udcfe\udcff")
_LAYOUTS = (
    ({"images", "annotations"}, "; captions in COCO's layout are read by type: coco_captions"),
    ({"questions"}, "; VQAv2's questions and annotations are read by type: vqav2"),
)


@dataclass(frozen=True)
class BrokenLine:
    """Stands for an entry that cannot be read."""

    detail: str


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
    buffer = _Buffer(text, name)
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
        yield from _line_entries(buffer, first)


def read_member(text: TextIO, name: str, member: str) -> Iterator[object]:
    """Every entry of a list that stands under a key of the JSON object that the file is. As `read_entries`.

    Raises:
        ValueError: also where the object has no such list.
    """
    buffer = _Buffer(text, name)
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
    buffer = _Buffer(text, name)
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


def refuse_utf16(start: str, name: str) -> None:
    """Raise ValueError when the start of a file, read as UTF-8, shows that it is UTF-16 or UTF-32."""
    if start.startswith(_UTF16) or "\0" in start[:4]:
        raise ValueError(f"{name} is in UTF-16 or UTF-32, expected UTF-8: convert it (iconv -f UTF-16 -t UTF-8)")


def parse_json(text: str) -> object:
    """The value of a whole JSON text. Raises ValueError that says what is wrong, also of what Python does not read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise ValueError(f"the JSON {_unread(error)}") from error


class _Buffer:
    """What was read of a file and is not yet used, and where in the file that is."""

    def __init__(self, text: TextIO, name: str):
        self._text, self.name = text, name
        self.buffer, self.at, self.ended = text.read(_CHUNK), 0, False
        refuse_utf16(self.buffer[:4], name)
        self.at = int(self.buffer.startswith("\ufeff"))
        self._line, self._column = 1, 1  # of the buffer's first character

    def more(self) -> bool:
        """Read on, as much as is unused, so that trying anew each time costs twice the reading in all."""
        self._line, self._column = self._place(self.at)
        self.buffer, self.at = self.buffer[self.at :], 0
        chunk = self._text.read(max(_CHUNK, len(self.buffer)))
        self.buffer += chunk
        self.ended = not chunk
        return bool(chunk)

    def next(self) -> str:
        """The next character that is no white space, which stays unused; "" at the end of the file."""
        while True:
            space = _SPACE.match(self.buffer, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def place(self, at: int | None = None) -> str:
        """Where in the file a character is, by default the next one."""
        return "line {} column {}".format(*self._place(self.at if at is None else at))

    def line(self) -> int:
        """The number of the line that the next character is in."""
        return self._place(self.at)[0]

    def _place(self, at: int) -> tuple[int, int]:
        newlines = self.buffer.count("\n", 0, at)
        if not newlines:
            return self._line, self._column + at
        return self._line + newlines, at - self.buffer.rindex("\n", 0, at)

    def skip_value(self) -> None:
        """Leave out a value, of whatever depth and length, without keeping it."""
        depth, inside = 0, False
        while True:
            mark = (_STRING_MARK if inside else _MARK).search(self.buffer, self.at)
            if mark is None or (mark[0] == "\\" and mark.end() == len(self.buffer)):
                self.at = len(self.buffer) if mark is None else mark.start()
                if not self.more():
                    raise ValueError(f"{self.name}: the file ends inside a value; is it cut off?")
            elif mark[0] == "\\":
                self.at = mark.end() + 1
            elif mark[0] == '"':
                self.at, inside = mark.end(), not inside
                if not inside and not depth:
                    return
            elif mark[0] in "[{":
                self.at, depth = mark.end(), depth + 1
            elif not depth:  # the end of a number or a word
                self.at = mark.start()
                return
            else:
                self.at, depth = mark.end(), depth - (mark[0] != ",")
                if not depth:
                    return

    def value(self, what: str) -> object:
        """The next value, or a BrokenLine for one that is left out. Raises ValueError when it is not JSON."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
                # A number may go on in the next chunk: it has ended only where something else follows.
                number = isinstance(value, int | float)
                if self.ended or (self.buffer[end : end + 1] in _BEHIND_NUMBER if number else end < len(self.buffer)):
                    if end - self.at > LONGEST_ENTRY:
                        value = BrokenLine(f"{what} has more than {LONGEST_ENTRY:,} characters")
                    self.at = end
                    return value
                problem = None
            except json.JSONDecodeError as error:
                problem, unsure = None, error.pos > len(self.buffer) - _UNSURE or error.msg.startswith("Unterminated")
                wrong = f"{error.msg} at {self.place(error.pos)}"
                if self.ended and (error.pos >= len(self.buffer.rstrip()) or error.msg.startswith("Unterminated")):
                    ends = f"{self.name}: the list ends inside or after {what}; is the file cut off?"
                    raise ValueError(f"{ends} ({wrong})") from error
                if self.ended or not unsure:
                    raise ValueError(f"{self.name} is not JSON in {what}: {wrong}") from error
            except (RecursionError, ValueError) as error:
                problem = _unread(error)
            if problem is None and len(self.buffer) - self.at > LONGEST_ENTRY:
                problem = f"has more than {LONGEST_ENTRY:,} characters"
            if problem:
                self.skip_value()
                return BrokenLine(f"{what} {problem}")
            self.more()

    def take_line(self) -> str | None:
        """The rest of the line, and be behind it; None for one that is too long to be read."""
        end = self.buffer.find("\n", self.at)
        while end < 0 and len(self.buffer) - self.at <= LONGEST_ENTRY and self.more():
            end = self.buffer.find("\n", self.at)
        if end >= 0 or self.ended:
            end = len(self.buffer) if end < 0 else end
            line, self.at = self.buffer[self.at : end], min(end + 1, len(self.buffer))
            return line if len(line) <= LONGEST_ENTRY else None
        while end < 0:
            self.at = len(self.buffer)
            if not self.more():
                return None
            end = self.buffer.find("\n", self.at)
        self.at = end + 1
        return None


_DECODER = json.JSONDecoder()


def _line_entries(buffer: _Buffer, first: str) -> Iterator[object]:
    number = buffer.line()
    if first == "{":
        _refuse_object(buffer)
    while buffer.next():
        number = buffer.line()
        line = buffer.take_line()
        if line is None:
            yield BrokenLine(f"line {number} has more than {LONGEST_ENTRY:,} characters")
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            yield BrokenLine(f"line {number} is not JSON: {error.msg} at column {error.colno}")
        except (RecursionError, ValueError) as error:
            yield BrokenLine(f"line {number} {_unread(error)}")


def _refuse_object(buffer: _Buffer) -> None:
    """Raise ValueError for a file that is one object over several lines; of JSONL, every line starts with its own."""
    while len(buffer.buffer) - buffer.at < _LOOK and buffer.more():
        pass
    end = buffer.buffer.find("\n", buffer.at)
    whole = end < 0 or bool(buffer.buffer[buffer.at : end].strip())
    following = _SPACE.sub("", buffer.buffer[end : end + 100]) if end >= 0 else ""
    try:
        _DECODER.raw_decode(buffer.buffer, buffer.at)
    except json.JSONDecodeError:
        pass
    except (RecursionError, ValueError):
        return
    else:
        inside = _DECODER.raw_decode(buffer.buffer, buffer.at)[1]
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


def _members(buffer: _Buffer) -> Iterator[str]:
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


def _list_entries(buffer: _Buffer) -> Iterator[object]:
    buffer.at += 1
    count, separator_due = 0, False  # true after an entry: the next character must be a comma or the closing bracket
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


def _unread(error: Exception) -> str:
    """What Python does not read of valid JSON."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return "has an integer of more than 4,300 digits"
