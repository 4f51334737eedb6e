"""Figures of an evaluation, each as the bytes of a PNG: the report's, and the sheet to look at before the numbers.

Colours are told apart by colour-blind readers (Okabe and Ito 2008) and by shape. Answers are anybody's text: nothing in
them is read as mathematics, and control characters are shown as boxes.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from mlmamba.conversation import clean
from mlmamba.images import WIDEST, open_image
from pipelines.sheet_text import Style, Typesetter
from pipelines.sources import open_source
from workflows.evaluate.benchmarks.base import normalise
from workflows.evaluate.intervals import Calibration
from workflows.evaluate.questions import Image, sample_images
from workflows.evaluate.statistics import Interval
from workflows.recipe.schema import Recipe

MODEL, BLIND, MAJORITY, INK, GRID = "#0072B2", "#D55E00", "#8a8f98", "#1c1c1c", "#dfe2e6"
_WIDTH, _DPI = 7.2, 150
_LABEL = 22  # characters of an answer in a figure
_CARD, _TALLEST, _GAP = 340, 340, 20  # pixels of the sheet: width of an image, its height at most, space between
_QUESTIONS, _LINES, _LONGEST = 4, 8, 240  # of an image; lines of one, and characters of one and of its answer
_RIGHT, _WRONG, _QUIET = Style("#1c1c1c"), Style("#c0143c"), Style("#8a8f98")


@dataclass(frozen=True)
class Bar:
    """One line of the scores' figure; blind and majority may be unknown."""

    name: str
    interval: Interval
    blind: float | None
    majority: float | None


def plot_scores(bars: Sequence[Bar]) -> bytes:
    """Scores with their intervals, beside blind and majority, one line for each."""
    figure = Figure(figsize=(_WIDTH, 1.1 + 0.36 * len(bars)))
    axis = figure.subplots()
    places = np.arange(len(bars))[::-1]
    for place, bar in zip(places, bars, strict=True):
        if place % 2:
            axis.axhspan(place - 0.5, place + 0.5, color="#f4f6f8", zorder=0)
        low, high = bar.interval.low, bar.interval.high
        axis.plot([low, high], [place, place], color=MODEL, linewidth=5, alpha=0.35, solid_capstyle="butt")
    points = {
        "model, 95% interval": (MODEL, "o", [bar.interval.value for bar in bars]),
        "blind": (BLIND, "D", [bar.blind for bar in bars]),
        "majority answer": (MAJORITY, "|", [bar.majority for bar in bars]),
    }
    for label, (colour, marker, values) in points.items():
        known = [(value, place) for value, place in zip(values, places, strict=True) if value is not None]
        if known:
            size = {"o": 6, "D": 5, "|": 12}[marker]
            style = {"markersize": size, "markeredgewidth": 2 if marker == "|" else 1}
            axis.plot(*zip(*known, strict=True), marker, color=colour, label=label, **style)
    axis.set_yticks(places, [shorten(bar.name) for bar in bars], parse_math=False)
    axis.set_ylim(-0.6, len(bars) - 0.4)
    axis.set_xlim(-0.01, 1.01)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.grid(axis="x", color=GRID)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=9, handletextpad=0.4)
    return _png(figure, axis)


def plot_confusion(counts: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> bytes:
    """Reference answers (rows) against what the model said (columns): counts, shaded by their share of the row."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(_WIDTH, 1.6 + 0.4 * len(rows)))
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if share[row, column] > 0.55 else INK
            axis.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(columns)), [shorten(name) for name in columns], rotation=40, ha="right", parse_math=False)
    axis.set_yticks(range(len(rows)), [shorten(name) for name in rows], parse_math=False)
    axis.set_xlabel("the model's answer")
    axis.set_ylabel("reference answer")
    return _png(figure, axis)


def plot_calibration(calibration: Calibration, yes: str = "Yes") -> bytes:
    """Reliability diagram, and below it how many questions lie in each bin."""
    figure = Figure(figsize=(0.75 * _WIDTH, 0.85 * _WIDTH))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    filled = [b for b in calibration.bins if b.items]
    above.plot([0, 1], [0, 1], color=MAJORITY, linestyle="--", linewidth=1, label="perfectly calibrated")
    above.plot([b.mean for b in filled], [b.share for b in filled], "o-", color=MODEL, label="model")
    above.set_ylabel(f'share whose answer is "{yes}"')
    above.set_ylim(-0.03, 1.03)
    above.legend(frameon=False, fontsize=9, loc="upper left")
    width = calibration.bins[0].high - calibration.bins[0].low
    centres = [(b.low + b.high) / 2 for b in calibration.bins]
    below.bar(centres, [b.items for b in calibration.bins], width=0.92 * width, color=MODEL, alpha=0.6)
    below.set_xlabel(f'probability of "{yes}" as first token')
    below.set_ylabel("questions")
    below.set_xlim(-0.02, 1.02)
    for axis in (above, below):
        axis.grid(color=GRID)
    return _png(figure, above, below)


def plot_histograms(values: dict[str, Sequence[float]]) -> bytes:
    """One histogram for each name, side by side: counts on a log scale, the median as a line."""
    figure = Figure(figsize=(_WIDTH, 2.7))
    axes = np.atleast_1d(figure.subplots(1, len(values)))
    for axis, (name, numbers) in zip(axes, values.items(), strict=True):
        numbers = np.asarray(numbers, dtype=float)
        whole = bool((numbers == numbers.round()).all()) and np.ptp(numbers) < 30
        bins = np.arange(numbers.min() - 0.5, numbers.max() + 1) if whole else 24
        axis.hist(numbers, bins=bins, color=MODEL, alpha=0.75, log=True)
        axis.axvline(float(np.median(numbers)), color=BLIND, linewidth=1.5)
        axis.set_xlabel(name)
        axis.grid(axis="y", color=GRID)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("questions")
    return _png(figure, *axes)


def shorten(text: str, longest: int = _LABEL) -> str:
    """Any text as a label on one line."""
    clean = "".join(c if c.isprintable() else "\N{WHITE SQUARE}" for c in " ".join(text.split()))
    return (clean if len(clean) <= longest else clean[: longest - 3] + "...") or "(nothing)"


def _png(figure: Figure, *axes) -> bytes:
    for axis in axes:
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9, colors=INK, length=0)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color(GRID)
    return saved(figure, dpi=_DPI, bbox_inches="tight")


def saved(figure: Figure, **options) -> bytes:
    """A figure as the bytes of a PNG.

    A character of a script without a font is a box in it, which is seen there: matplotlib's warnings, one for each of
    the characters, do not belong into the output of a command.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph|Matplotlib currently does not support")
        figure.savefig(buffer, format="png", facecolor="white", **options)
    return buffer.getvalue()


def draw_sheet(
    recipe: Recipe, images: list[Image], predictions: dict[str, str], columns: int = 4, rows: int = 3
) -> bytes:
    """A seeded sample of test images, each with up to four questions; wrong answers in red.

    Args:
        images: the recipe's test sources, as `load_questions` lists them.
        predictions: prediction by question id.
    """
    sources = [open_source(config) for config in recipe.data.test]
    cards = []
    for image in sample_images(recipe, images, columns * rows):
        shown = open_image(sources[image.source].read_image(image.location), WIDEST).convert("RGB")
        cards.append(_card(shown, image, predictions))
    columns = min(columns, max(len(cards), 1))
    width = _GAP + columns * (_CARD + _GAP)
    head = Typesetter(18)
    title = head.lines([(f"{recipe.name}: sample test images, questions and answers (red: wrong)", _RIGHT)], width)
    lines = [cards[first : first + columns] for first in range(0, len(cards), columns)]
    top = 2 * _GAP + len(title) * head.line_height
    sheet = PIL.Image.new("RGB", (width, top + sum(_GAP + max(c.height for c in line) for line in lines)), "white")
    head.draw(sheet, (_GAP, _GAP), title)
    for line in lines:
        for column, card in enumerate(line):
            sheet.paste(card, (_GAP + column * (_CARD + _GAP), top))
        top += _GAP + max(card.height for card in line)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _card(shown: PIL.Image.Image, image: Image, predictions: dict[str, str]) -> PIL.Image.Image:
    """An image, enlarged or made smaller to the card's width, its record's name, and what was asked and said below."""
    scale = min(_CARD / shown.width, _TALLEST / shown.height)
    size = tuple(max(1, round(side * scale)) for side in shown.size)
    smooth = PIL.Image.Resampling.LANCZOS if scale < 1 else PIL.Image.Resampling.NEAREST
    text, small = Typesetter(13), Typesetter(11)
    parts = [(small, small.lines([(shorten(image.record_id, 60), _QUIET)], _CARD))]
    for question, answer, key in list(zip(image.questions, image.answers, image.ids, strict=True))[:_QUESTIONS]:
        said = predictions[key]
        right = normalise(said) == normalise(answer)
        verdict = said if right else f"{said or '(nothing)'}  (right: {answer})"
        pieces = [
            (shorten(clean(question), _LONGEST) + " ", _RIGHT),
            (shorten(verdict, _LONGEST), _RIGHT if right else _WRONG),
        ]
        lines = text.lines(pieces, _CARD)
        if len(lines) > _LINES:
            lines = [*lines[: _LINES - 1], *text.lines([(f"... {len(lines) - _LINES + 1} more lines", _QUIET)], _CARD)]
        parts.append((text, lines))
    height = size[1] + 6 + sum(4 + len(lines) * setter.line_height for setter, lines in parts)
    card = PIL.Image.new("RGB", (_CARD, height), "white")
    card.paste(shown.resize(size, smooth), ((_CARD - size[0]) // 2, 0))
    top = size[1] + 6
    for setter, lines in parts:
        setter.draw(card, (0, top), lines)
        top += 4 + len(lines) * setter.line_height
    return card
