"""What was read of a JSON file and is not yet used, in bounded memory, and where in the file that is.

An entry that JSON allows and Python does not read (nested a thousand deep, an integer of 4,300 digits) and one of more
than `LONGEST_ENTRY` characters are left out by themselves.
"""

import json
import re
from dataclasses import dataclass
from typing import TextIO

_CHUNK = 1 << 20  # characters read at a time
LONGEST_ENTRY = 1 << 26  # characters of an entry that is read
_UNSURE = 16  # characters before the end of what was read in which an error may only mean that more follows
_BEHIND_NUMBER = tuple(",]} \t\r\n")
_MARK, _STRING_MARK = re.compile(r'["\[\]{},]'), re.compile(r'["\\]')
SPACE = re.compile(r"\s+")
_UTF16 = ("\udcff\udcfe", "\udcfe\udcff")
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class BrokenLine:
    """Stands for an entry that cannot be read."""

    detail: str


class Buffer:
    """What was read of a file and is not yet used, and where in the file that is.

    Args:
        text: the file, or a part of it.
        name: what errors call it.
        place: line and column of its first character.
    """

    def __init__(self, text: TextIO, name: str, place: tuple[int, int] = (1, 1)):
        self._text, self.name = text, name
        self.buffer, self.at, self.ended = text.read(_CHUNK), 0, False
        if place == (1, 1):
            refuse_utf16(self.buffer[:4], name)
            self.at = int(self.buffer.startswith("\ufeff"))
        self._line, self._column = place  # of the buffer's first character
        self._counted = 0, self._line  # a place in the buffer, and its line

    def more(self) -> bool:
        """Read on, as much as is unused, so that trying anew each time costs twice the reading in all."""
        self._line, self._column = self._place(self.at)
        self.buffer, self.at = self.buffer[self.at :], 0
        self._counted = 0, self._line
        chunk = self._text.read(max(_CHUNK, len(self.buffer)))
        self.buffer += chunk
        self.ended = not chunk
        return bool(chunk)

    def next(self) -> str:
        """The next character that is no white space, which stays unused; "" at the end of the file."""
        while True:
            space = SPACE.match(self.buffer, self.at)
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
        at, line = self._counted  # asked for every line, so what was counted is not counted again
        self._counted = self.at, line + self.buffer.count("\n", at, self.at)
        return self._counted[1]

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
                value, end = DECODER.raw_decode(self.buffer, self.at)
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
                problem = unread(error)
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


def refuse_utf16(start: str, name: str) -> None:
    """Raise ValueError when the start of a file, read as UTF-8, shows that it is UTF-16 or UTF-32."""
    if start.startswith(_UTF16) or "\0" in start[:4]:
        raise ValueError(f"{name} is in UTF-16 or UTF-32, expected UTF-8: convert it (iconv -f UTF-16 -t UTF-8)")


def unread(error: Exception) -> str:
    """What Python does not read of valid JSON."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return "has an integer of more than 4,300 digits"
