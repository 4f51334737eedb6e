"""Draw samples of a data set into a PNG as the model sees them: square images, decoded text, loss tokens in green.

`choose` picks the samples and `sample_of` decodes them; the rest of the file lays them out as cards on one page.
"""

import io
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, zip_longest

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tokenizers import Tokenizer

from mlmamba.conversation import FORMATS, IGNORE_INDEX
from mlmamba.image_files import format_of
from mlmamba.image_layout import ImageLayout
from mlmamba.images import WIDEST, ImageError, image_size, open_image, to_pixels
from pipelines import storage
from pipelines.manifest import TOKENIZER_PATH
from pipelines.packed import PackedDataset, PackedRow
from pipelines.sheet_text import Style, Typesetter
from pipelines.shuffle import permutation

_ROWS = 100  # rows that the choice is made from
PLAIN, LOSS, IMAGE, WRONG = "plain", "loss", "image", "wrong"
_COLUMNS, _CARD, _GAP, _MARGIN = 2, 860, 24, 28  # pixels, but for the first
_IMAGES, _MOST_IMAGES = 224, 9  # side of the place for a card's images; how many are drawn there
_LINES, _TAIL = 24, 7  # lines of a card at most; of these, how many are the end of what is longer
_INK, _QUIET, _EDGE = "#1c1c1c", "#8a8f98", "#d5d9df"
_STYLES = {
    PLAIN: Style(_INK),
    LOSS: Style(_INK, "#bdf0c4"),
    IMAGE: Style("#0b3d91", "#d6e6ff"),
    WRONG: Style("#ffffff", "#d0103a"),
}
_MARKS = [mark.strip() for chat in FORMATS.values() for mark in (chat.user, chat.assistant, chat.system) if mark]
_MARK = re.compile("(" + "|".join(map(re.escape, _MARKS)) + r"|<\|end_?of_?text\|>|\n)")


@dataclass(frozen=True)
class Sample:
    """One sample, decoded from its row."""

    id: str
    source: str
    row: int
    tokens: int
    loss_tokens: int
    images: list[bytes]
    """Encoded images."""
    pieces: list[tuple[str, str]]
    """(text, kind) in reading order. Kinds: LOSS where the model learns to write the text, PLAIN where it only reads
    it, IMAGE for an image's tokens, and WRONG for what should not be: a label that differs from its token, or an
    image with too many or too few tokens."""
    pixels: int
    """Version of the rules by which training shows the images."""
    layout: ImageLayout
    """How training cuts them."""


def draw_sheet(uri: str, out: str, split: str = "train", count: int = 12, seed: int = 0) -> dict:
    """Draw samples of a data set into a PNG file. The file is written whole or not at all.

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


def choose(uri: str, split: str, count: int, seed: int) -> list[Sample]:
    """Choose up to `count` samples of a split, from every source, with no, one and several images where they exist.

    Raises:
        FileNotFoundError, ValueError: as PackedDataset.
    """
    dataset = PackedDataset(uri, split)
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for index in permutation(len(dataset), seed, "sheet")[:_ROWS].tolist():
        row = dataset[index]
        owners = row.seq_idx[row.image_positions]
        for place, source in enumerate(row.source):
            kind = source, min(int((owners == place).sum()), 2)
            groups.setdefault(kind, []).append((index, place))
    # Shuffled, because a row can hold dozens of samples: unshuffled, all would come from the first rows.
    queues = [[group[i] for i in permutation(len(group), seed, "group")] for _, group in sorted(groups.items())]
    turns = [place for one_of_each in zip_longest(*queues) for place in one_of_each if place is not None]
    chosen = turns[:count]
    tokenizer = Tokenizer.from_buffer(storage.read_bytes(storage.join(uri, TOKENIZER_PATH)))
    layout = dataset.manifest.layout
    return [sample_of(dataset[index], index, place, tokenizer, layout) for index, place in chosen]


def sample_of(row: PackedRow, index: int, place: int, tokenizer: Tokenizer, layout: ImageLayout) -> Sample:
    """Decode the sample at `place` of row number `index`."""
    here = np.flatnonzero(row.seq_idx == place)
    ids, labels = row.input_ids[here], row.labels[here]
    own = np.flatnonzero(row.seq_idx[row.image_positions] == place)
    starts = row.image_positions[own] - here[0]
    kinds = np.where(labels == IGNORE_INDEX, PLAIN, np.where(labels == ids, LOSS, WRONG)).astype(object)
    texts: dict[int, tuple[str, str]] = {}
    for number, start in enumerate(starts, 1):
        after = np.flatnonzero(ids[start:] != ids[start])
        limit = starts[number] - start if number < len(starts) else len(ids)
        found = min(int(after[0]) if len(after) else len(ids) - start, int(limit))
        right = (
            found == _expected(row.images[own[number - 1]], layout) and (kinds[start : start + found] == PLAIN).all()
        )
        name = f"<image {number} x {found}>" if len(starts) > 1 else f"<image x {found}>"
        texts[int(start)] = name.replace(" ", "\u00a0"), IMAGE if right else WRONG
        kinds[start : start + found] = f"image {start}"
    pieces, at = [], 0
    for kind, group in groupby(kinds):
        length = len(list(group))
        decoded = tokenizer.decode(ids[at : at + length].tolist(), skip_special_tokens=False)
        pieces.append(texts[at] if re.match("image ", kind) else (decoded, kind))
        at += length
    return Sample(
        row.sample_ids[place],
        row.source[place],
        index,
        len(ids),
        int((labels != IGNORE_INDEX).sum()),
        [row.images[i] for i in own],
        pieces,
        row.pixels,
        layout,
    )


def _expected(data: bytes, layout: ImageLayout) -> int | None:
    """Tokens that an encoded image should have."""
    if layout.fixed is not None:
        return layout.fixed
    with suppress(ImageError):
        width, height = image_size(data, WIDEST)
        return layout.count(height, width)


def _page(title: str, cards: list[Image.Image], text: Typesetter) -> Image.Image:
    """Put all cards under a title and a legend, each into the column that is shorter so far."""
    head = Typesetter(20)
    width = 2 * _MARGIN + _COLUMNS * _CARD + (_COLUMNS - 1) * _GAP
    inner = width - 2 * _MARGIN
    legend: list[tuple[str, Style]] = [
        (" trained to write ", _STYLES[LOSS]),
        ("   read only   ", _STYLES[PLAIN]),
        (" <image x tokens> ", _STYLES[IMAGE]),
        ("   ", _STYLES[PLAIN]),
        (" wrong label or number of image tokens ", _STYLES[WRONG]),
        ("   images are as the model gets them, square if it does", Style(_QUIET)),
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
    """Draw one sample: a line about its origin, its images on the left, its conversation on the right."""
    pad, small = 14, Typesetter(12)
    left = pad + (_IMAGES + pad if sample.images else 0)
    facts = f"{sample.source}, row {sample.row}, {sample.tokens:,} tokens, {sample.loss_tokens:,} with loss"
    heading = small.lines([(sample.id, Style(_INK)), (f"   {facts}", Style(_QUIET))], _CARD - 2 * pad)
    body = _shortened(text.lines(_pieces(sample), _CARD - left - pad), text)
    images, captions = _images(sample.images, sample.pixels, sample.layout)
    notes = small.lines([(captions, Style(_QUIET))], _IMAGES) if captions else []
    top = pad + len(heading) * small.line_height + 8
    bottom = top + max(len(body) * text.line_height, images.height + 4 + len(notes) * small.line_height)
    card = Image.new("RGB", (_CARD, bottom + pad), "white")
    ImageDraw.Draw(card).rectangle((0, 0, card.width - 1, card.height - 1), outline=_EDGE)
    small.draw(card, (pad, pad), heading)
    card.paste(images, (pad, top))
    small.draw(card, (pad, top + images.height + 4), notes)
    text.draw(card, (left, top), body)
    return card


def _pieces(sample: Sample) -> list[tuple[str, Style]]:
    """Style the conversation: role marks and line ends in grey, with a visible mark for each line end."""
    pieces = []
    for text, kind in sample.pieces:
        style = _STYLES[kind]
        for part in filter(None, _MARK.split(text)):
            quiet = Style(_QUIET, style.paper) if kind in (PLAIN, LOSS) and _MARK.fullmatch(part) else style
            pieces.append((part.replace("\n", "\u21b5\n"), quiet))
    return pieces


def _shortened(lines: list, text: Typesetter) -> list:
    """Keep the beginning and the end of a text of more than `_LINES` lines, with a note between."""
    if len(lines) <= _LINES:
        return lines
    head = _LINES - _TAIL - 1
    note = text.lines([(f"... {len(lines) - head - _TAIL:,} lines are not shown ...", Style("#b45f06"))], _CARD)
    return lines[:head] + note + lines[-_TAIL:]


def _images(images: list[bytes], pixels: int, layout: ImageLayout) -> tuple[Image.Image, str]:
    """Return a sample's images in a square grid, numbered when there are several, and their sizes as text."""
    if not images:
        return Image.new("RGB", (1, 1), "white"), ""
    shown = images[:_MOST_IMAGES]
    across = next(n for n in (1, 2, 3) if n * n >= len(shown))
    side = (_IMAGES - 4 * (across - 1)) // across
    down = -(-len(shown) // across)
    grid = Image.new("RGB", (_IMAGES, down * (side + 4) - 4), "white")
    sizes = []
    for i, data in enumerate(shown):
        x, y = (i % across) * (side + 4), (i // across) * (side + 4)
        tile, size = _tile(data, side, pixels, layout)
        grid.paste(tile, (x, y))
        if len(images) > 1:
            number = Typesetter(12)
            number.draw(grid, (x, y), number.lines([(f" {i + 1} ", Style("white", "#1c1c1c"))], side))
            size = f"{i + 1}: {size}"
        sizes.append(size)
    if len(images) > len(shown):
        sizes.append(f"and {len(images) - len(shown)} more")
    return grid, "\n".join(sizes)


def _tile(data: bytes, side: int, pixels: int, layout: ImageLayout) -> tuple[Image.Image, str]:
    """Decode an image as training does. Returns it with its size as text, or a red tile with the error."""
    try:
        image = open_image(data, WIDEST, pixels)
    except ImageError as error:
        return Image.new("RGB", (side, side), "#d0103a"), str(error)
    text = f"{image.width} x {image.height} {format_of(data)}, {len(data) / 1024:,.1f} KiB"
    if layout.fixed is not None:
        return Image.fromarray(to_pixels(image, side, pixels).transpose(1, 2, 0)), text
    seen = layout.cut(image, pixels)
    shown = layout.picture(seen)
    text += f"\nseen at {shown.width} x {shown.height}, {seen.tokens:,} tokens"
    small = ImageOps.contain(shown, (side, side))
    tile = Image.new("RGB", (side, side), "white")
    tile.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return tile, text
