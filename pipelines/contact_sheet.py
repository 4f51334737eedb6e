"""A PNG of samples as the model sees them: square pictures, decoded conversation, and what has loss in green."""

import io
import re

import numpy as np
from PIL import Image, ImageDraw

from mlmamba.conversation import ASSISTANT, USER
from mlmamba.pictures import PictureError, load_pixels
from pipelines import storage
from pipelines.sheet_samples import LOSS, PICTURE, PLAIN, WRONG, Sample, choose
from pipelines.sheet_text import Style, Typesetter

_COLUMNS, _CARD, _GAP, _MARGIN = 2, 860, 24, 28  # pixels, but for the first
_PICTURES, _MOST_PICTURES = 224, 9  # side of the place for a card's pictures; how many are drawn there
_LINES, _TAIL = 24, 7  # lines of a card at most; of these, how many are the end of what is longer
_INK, _QUIET, _EDGE = "#1c1c1c", "#8a8f98", "#d5d9df"
_STYLES = {
    PLAIN: Style(_INK),
    LOSS: Style(_INK, "#bdf0c4"),
    PICTURE: Style("#0b3d91", "#d6e6ff"),
    WRONG: Style("#ffffff", "#d0103a"),
}
_MARK = re.compile("(" + "|".join(re.escape(mark) for mark in (USER, ASSISTANT)) + r"|<\|endoftext\|>|\n)")


def draw_sheet(uri: str, out: str, split: str = "train", count: int = 12, seed: int = 0) -> dict:
    """Draw samples of a data set into a PNG file, which is written whole or not at all.

    Args:
        uri: folder of the data set.
        out: the file, path or URI.
        split: "train" or "validation".
        count: samples.
        seed: of the choice.

    Returns:
        `sheet` (the file), `samples` (how many) and `characters_without_font` (count by script).

    Raises:
        FileNotFoundError, ValueError: as PackedDataset.
        OSError: the file cannot be written.
    """
    text = Typesetter(15)
    samples = choose(uri, split, count, seed)
    cards = [_card(sample, text) for sample in samples]
    title = f"{storage.shown(uri)}: {len(samples)} samples of the {split} split, seed {seed}"
    buffer = io.BytesIO()
    _page(title, cards, text).save(buffer, "PNG")
    try:
        storage.write_atomic(out, buffer.getvalue())
    except OSError as error:
        raise OSError(f"cannot write {storage.shown(out)} ({error}); choose another place") from error
    return {"sheet": storage.shown(out), "samples": len(samples), "characters_without_font": dict(text.missing)}


def _page(title: str, cards: list[Image.Image], text: Typesetter) -> Image.Image:
    """All cards under a title and a legend, each in the column that is shorter."""
    head = Typesetter(20)
    width = 2 * _MARGIN + _COLUMNS * _CARD + (_COLUMNS - 1) * _GAP
    inner = width - 2 * _MARGIN
    legend: list[tuple[str, Style]] = [
        (" trained to write ", _STYLES[LOSS]),
        ("   read only   ", _STYLES[PLAIN]),
        (" <image x tokens> ", _STYLES[PICTURE]),
        ("   ", _STYLES[PLAIN]),
        (" wrong label or number of image tokens ", _STYLES[WRONG]),
        ("   pictures are square because the model gets them so", Style(_QUIET)),
    ]
    if text.missing:
        scripts = ", ".join(f"{script} {count}" for script, count in text.missing.most_common(6))
        legend.append(
            (f"\nno font on this machine for some characters ({scripts}): boxes stand for them", Style("#b45f06"))
        )
    titles, legends = head.lines([(title, Style(_INK))], inner), text.lines(legend, inner)
    top = _MARGIN + len(titles) * head.line_height + len(legends) * text.line_height + _GAP
    heights, places = [top] * _COLUMNS, []
    for card in cards:
        column = int(np.argmin(heights))
        places.append((_MARGIN + column * (_CARD + _GAP), heights[column]))
        heights[column] += card.height + _GAP
    page = Image.new("RGB", (width, max(heights) + _MARGIN - _GAP), "#f4f5f7")
    head.draw(page, (_MARGIN, _MARGIN), titles)
    text.draw(page, (_MARGIN, _MARGIN + len(titles) * head.line_height), legends)
    for card, place in zip(cards, places, strict=True):
        page.paste(card, place)
    return page


def _card(sample: Sample, text: Typesetter) -> Image.Image:
    """One sample: where it is from, its pictures on the left, its conversation beside them."""
    pad, small = 14, Typesetter(12)
    left = pad + (_PICTURES + pad if sample.images else 0)
    facts = f"{sample.source}, row {sample.row}, {sample.tokens:,} tokens, {sample.loss_tokens:,} with loss"
    heading = small.lines([(sample.id, Style(_INK)), (f"   {facts}", Style(_QUIET))], _CARD - 2 * pad)
    body = _shortened(text.lines(_pieces(sample), _CARD - left - pad), text)
    pictures, captions = _pictures(sample.images)
    notes = small.lines([(captions, Style(_QUIET))], _PICTURES) if captions else []
    top = pad + len(heading) * small.line_height + 8
    bottom = top + max(len(body) * text.line_height, pictures.height + 4 + len(notes) * small.line_height)
    card = Image.new("RGB", (_CARD, bottom + pad), "white")
    ImageDraw.Draw(card).rectangle((0, 0, card.width - 1, card.height - 1), outline=_EDGE)
    small.draw(card, (pad, pad), heading)
    card.paste(pictures, (pad, top))
    small.draw(card, (pad, top + pictures.height + 4), notes)
    text.draw(card, (left, top), body)
    return card


def _pieces(sample: Sample) -> list[tuple[str, Style]]:
    """The conversation as styled text: role marks and line ends in grey, line ends visible."""
    pieces = []
    for text, kind in sample.pieces:
        style = _STYLES[kind]
        for part in filter(None, _MARK.split(text)):
            quiet = Style(_QUIET, style.paper) if kind in (PLAIN, LOSS) and _MARK.fullmatch(part) else style
            pieces.append((part.replace("\n", "\u21b5\n"), quiet))
    return pieces


def _shortened(lines: list, text: Typesetter) -> list:
    """The beginning and the end of what has more than `_LINES` lines."""
    if len(lines) <= _LINES:
        return lines
    head = _LINES - _TAIL - 1
    note = text.lines([(f"... {len(lines) - head - _TAIL:,} lines are not shown ...", Style("#b45f06"))], _CARD)
    return lines[:head] + note + lines[-_TAIL:]


def _pictures(images: list[bytes]) -> tuple[Image.Image, str]:
    """A sample's pictures in a square grid, numbered when there are several, and their sizes as text."""
    if not images:
        return Image.new("RGB", (1, 1), "white"), ""
    shown = images[:_MOST_PICTURES]
    across = next(n for n in (1, 2, 3) if n * n >= len(shown))
    side = (_PICTURES - 4 * (across - 1)) // across
    down = -(-len(shown) // across)
    grid = Image.new("RGB", (_PICTURES, down * (side + 4) - 4), "white")
    sizes = []
    for i, data in enumerate(shown):
        x, y = (i % across) * (side + 4), (i // across) * (side + 4)
        tile, size = _tile(data, side)
        grid.paste(tile, (x, y))
        if len(images) > 1:
            number = Typesetter(12)
            number.draw(grid, (x, y), number.lines([(f" {i + 1} ", Style("white", "#1c1c1c"))], side))
            size = f"{i + 1}: {size}"
        sizes.append(size)
    if len(images) > len(shown):
        sizes.append(f"and {len(images) - len(shown)} more")
    return grid, "\n".join(sizes)


def _tile(data: bytes, side: int) -> tuple[Image.Image, str]:
    """A picture decoded as training decodes it, and its stored size."""
    try:
        tile = Image.fromarray(load_pixels(data, side).transpose(1, 2, 0))
    except PictureError as error:
        return Image.new("RGB", (side, side), "#d0103a"), str(error)
    with Image.open(io.BytesIO(data)) as stored:
        return tile, f"{stored.width} x {stored.height} {stored.format}, {len(data) / 1024:,.1f} KiB"
