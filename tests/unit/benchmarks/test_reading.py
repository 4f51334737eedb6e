"""The reading study asks what the page shows, and both models see the same pages and are of a size."""

import numpy as np
import pytest
import torch
from PIL import ImageColor

from tests.benchmarks.studies.reading import (
    ANSWERS,
    CELL,
    DIGITS,
    FIRST,
    LINES,
    PALETTE,
    PLATE,
    PLATES,
    SIDES,
    Pages,
    build,
    logits_of_answers,
)


@pytest.mark.parametrize(("texts", "width"), [(DIGITS, PLATE), (LINES, 4 * PLATE)], ids=["digits", "lines"])
def test_a_page_shows_each_plate_once_and_whole(texts, width):
    pages = Pages(1, 0, texts)
    page, shown = pages.draw(3 * CELL)
    assert page.size == (3 * CELL, 3 * CELL)
    assert len(shown) == PLATES
    values = np.array(page)
    for colour in PALETTE:
        rows, columns = (values == ImageColor.getrgb(colour)).all(-1).nonzero()
        assert rows.max() - rows.min() == PLATE - 1
        assert columns.max() - columns.min() == width - 1
        assert len(rows) > PLATE * width / 2
    assert SIDES[-1] == 40 * PLATE
    assert len(set(texts)) == ANSWERS
    widest = max(font.getlength(text) for font in pages.fonts for text in texts)
    assert widest <= width  # no text leaves its plate


def test_the_answers_are_the_digits_on_the_named_plates():
    model, pages = build("native", 32), Pages(16, 1)
    drawn = []
    original, pages.draw = pages.draw, lambda side: drawn.append(original(side)) or drawn[-1]
    images, ids, answers = pages.batch(3, SIDES[0], model.image_layout)
    named = ids[:, -2 * PLATES :: 2] - FIRST - ANSWERS
    for row, (_, digits) in enumerate(drawn):
        assert answers[row].tolist() == digits[named[row]].tolist()
    assert torch.equal(ids[:, -2 * PLATES + 1 :: 2] - FIRST, answers)
    assert logits_of_answers(model, images, ids).shape == (3, PLATES, ANSWERS)


def test_both_models_have_as_many_parameters_and_the_tokens_that_they_should():
    native, square, capped = (build(way, 32) for way in ("native", "384", "at-most-384"))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (native, square)]
    assert abs(sizes[0] - sizes[1]) < 0.1 * sizes[0]  # the square has more position embeddings
    assert [native.image_layout.count(side, side) for side in SIDES] == [(side // CELL) ** 2 for side in SIDES]
    assert {square.image_layout.count(side, side) for side in SIDES} == {144}
    assert [capped.image_layout.count(side, side) for side in SIDES] == [9, 25, 100, 144]
