"""Coloured, wrapped text in any script on a Pillow image.

Fonts: matplotlib's own DejaVu Sans (Latin, Greek, Cyrillic, Arabic, ...), then whatever the machine has for the
characters that it lacks. A character that no font has becomes a box that names its script, and counts in `missing`.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_LINE = 1.45  # line height over font size


@dataclass(frozen=True)
class Style:
    """Colours of a piece of text."""

    ink: str = "#1c1c1c"
    paper: str | None = None
    """Colour behind it."""


@dataclass(frozen=True)
class _Word:
    """What stays on one line. `parts` are (text, font file)."""

    parts: tuple[tuple[str, str], ...]
    style: Style
    width: float
    direction: str
    """"R" or "L", or "" for numbers, marks and spaces, which follow their neighbours."""


class Typesetter:
    """Breaks pieces of text into lines and draws them."""

    def __init__(self, size: int):
        """Set in a font of `size` pixels."""
        self.size = size
        self.line_height = round(size * _LINE)
        self.missing: Counter[str] = Counter()
        """Characters that no font has, counted by script."""

    def lines(self, pieces: list[tuple[str, Style]], width: int) -> list[list[_Word]]:
        """Break pieces, which follow one another, into lines of `width` pixels."""
        lines: list[list[_Word]] = [[]]
        used = 0.0
        for text, style in pieces:
            for unit in _units(text):
                if unit == "\n":
                    lines.append([])
                    used = 0.0
                    continue
                for word in self._words(unit, style, width):
                    if used and used + word.width > width and unit.strip():
                        lines.append([])
                        used = 0.0
                    lines[-1].append(word)
                    used += word.width
        return lines

    def draw(self, image: Image.Image, at: tuple[int, int], lines: list[list[_Word]]) -> None:
        """Draw lines, the first with its upper left corner at `at`."""
        canvas = ImageDraw.Draw(image)
        for number, line in enumerate(lines):
            x, y = at[0], at[1] + number * self.line_height
            for word in _visual(line):
                if word.style.paper:
                    canvas.rectangle((x, y, x + word.width, y + self.line_height - 2), fill=word.style.paper)
                left = x
                for text, file in reversed(word.parts) if word.direction == "R" else word.parts:
                    font = _font(file, self.size)
                    canvas.text((left, y + self.size), text, font=font, fill=word.style.ink, anchor="ls")
                    left += font.getlength(text)
                x += word.width

    def _words(self, text: str, style: Style, width: int) -> list[_Word]:
        """One word, or several when it is wider than a line."""
        word = self._word(text, style)
        if word.width <= width or len(text) == 1:
            return [word]
        half = len(text) // 2
        return self._words(text[:half], style, width) + self._words(text[half:], style, width)

    def _word(self, text: str, style: Style) -> _Word:
        parts: list[tuple[str, str]] = []
        for character in text:
            file = _font_file(character)
            if file == _LAST_RESORT:
                self.missing[_script(character)] += 1
            if parts and (parts[-1][1] == file or unicodedata.combining(character)):
                parts[-1] = parts[-1][0] + character, parts[-1][1]
            else:
                parts.append((character, file))
        width = sum(_font(file, self.size).getlength(part) for part, file in parts)
        return _Word(tuple(parts), style, width, _direction(text))


_DEJAVU, _LAST_RESORT = str(_FONTS / "DejaVuSans.ttf"), str(_FONTS / "LastResortHE-Regular.ttf")


def _units(text: str) -> list[str]:
    """What a line may be broken between: words, spaces (not no-break ones), ideographs; a newline stands alone."""
    units = []
    for part in re.findall(r"\n|[ \r]+|[^ \r\n]+", text.replace("\t", "    ")):
        if any(unicodedata.east_asian_width(character) in "WF" for character in part):
            units += re.findall(r"[\u0021-\u024f]+|.", part)
        else:
            units.append(part)
    return units


def _visual(line: list[_Word]) -> list[_Word]:
    """Words in the order in which they stand on the line: those of a right-to-left stretch reversed."""
    out, stretch, between = [], [], []
    for word in line:
        if word.direction == "R":
            stretch += [*between, word]
            between = []
        elif stretch and not word.direction:
            between.append(word)
        else:
            out += [*reversed(stretch), *between, word]
            stretch, between = [], []
    return [*out, *reversed(stretch), *between]


def _direction(text: str) -> str:
    classes = {unicodedata.bidirectional(character) for character in text}
    return "R" if classes & {"R", "AL"} else "L" if "L" in classes else ""


def _script(character: str) -> str:
    """For people: the first word of a letter's name, which is its script."""
    if unicodedata.category(character)[0] not in "LM":
        return "symbol"
    return unicodedata.name(character, "unknown").split()[0].capitalize()


@lru_cache(maxsize=4096)
def _font_file(character: str) -> str:
    """The first font that has a character."""
    for file in (_DEJAVU, *(_system_fonts() if _cmap(_DEJAVU).get_char_index(ord(character)) == 0 else ())):
        if _cmap(file).get_char_index(ord(character)):
            return file
    return _LAST_RESORT


@lru_cache(maxsize=1)
def _system_fonts() -> tuple[str, ...]:
    """Fonts of this machine that can be set in any size, plain ones first."""
    usable = []
    slanted = re.compile("bold|italic|oblique|thin|light|black", re.IGNORECASE)
    for file in sorted(findSystemFonts(), key=lambda file: (slanted.search(Path(file).name) is not None, file)):
        try:
            _font(file, 12)
            _cmap(file)
        except (OSError, RuntimeError):  # bitmap-only or damaged
            continue
        usable.append(file)
    return tuple(usable)


@lru_cache(maxsize=256)
def _cmap(file: str) -> FT2Font:
    return FT2Font(file)


@lru_cache(maxsize=256)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
