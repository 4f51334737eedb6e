"""Spatial questions say what the images show, and cannot be answered without them."""

from collections import Counter

import numpy as np
import pytest

from tests.benchmarks.studies.evaluate_spatial import results, table
from tests.benchmarks.studies.evaluate_spatial_run import MAMBA, TRANSFORMER, Pair, Result
from tests.helpers.spatial_images import COLOURS, DISTANCES, LINES, SIDE, SIDES, WORDS, draw_questions

COUNT = 480


@pytest.fixture(scope="module")
def made():
    return draw_questions(COUNT, seed=3)


def centre(image, colour: str) -> np.ndarray:
    """Middle of the box around a colour's pixels, (x, y)."""
    pixels = np.asarray(image).astype(int)
    wanted = [int(COLOURS[colour][i : i + 2], 16) for i in (1, 3, 5)]
    ys, xs = np.nonzero(np.abs(pixels - wanted).sum(-1) < 20)
    return np.array([(xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2])


def from_the_other(image, colour: str) -> np.ndarray:
    """From the other shape's centre to this one's, (x, y)."""
    (other,) = set(COLOURS) - {colour}
    return centre(image, colour) - centre(image, other)


def test_the_answer_is_what_the_pixels_say(made):
    for one in made:
        sides = (one.question[0], one.question[2])
        axis = SIDES.index(sides)
        apart = from_the_other(one.image, one.question[-1])[axis]
        assert one.answer == sides[int(apart > 0)]
        low, high = DISTANCES[one.distance]
        assert low - 1 <= abs(apart) <= high + 1


def test_lessons_say_what_the_pixels_say_and_agree_with_the_question(made):
    for one in made:
        places, relations = one.lessons()
        assert (len(places), len(relations)) == (4, 4)
        assert (one.question, one.answer) in relations
        for asked, line in places:
            x, y = centre(one.image, asked[-1])
            where = x if "columns" in asked else y
            assert abs(where - (LINES.index(line) + 0.5) * SIDE / 4) <= SIDE / 8 + 1
        for asked, side in relations:
            axis = SIDES.index((asked[0], asked[2]))
            assert side == SIDES[axis][int(from_the_other(one.image, asked[-1])[axis] > 0)]
        assert {len(asked) for asked, _ in places + relations} == {len(one.question)}
        assert {word for asked, answer in places + relations for word in (*asked, answer)} <= set(WORDS)


def test_no_axis_distance_or_word_gives_the_answer_away(made):
    counts = Counter((one.distance, one.answer) for one in made)
    assert len(set(counts.values())) == 1
    assert len(counts) == len(DISTANCES) * 4
    larger = np.array([one.answer in ("right", "below") for one in made])
    for colour in COLOURS:
        assert 0.4 < larger[[one.question[-1] == colour for one in made]].mean() < 0.6


def test_the_two_shapes_differ_and_the_words_are_known(made):
    for one in made:
        assert one.image.size == (SIDE, SIDE)
        assert one.centres["red"] != one.centres["green"]
        assert set(one.question) | {one.answer} <= set(WORDS)


def test_the_seed_decides(made):
    again = draw_questions(COUNT, seed=3)
    assert [(o.question, o.answer, o.image.tobytes()) for o in again] == [
        (o.question, o.answer, o.image.tobytes()) for o in made
    ]
    assert [o.question for o in draw_questions(COUNT, seed=4)] != [o.question for o in made]


def test_an_effect_stands_beside_each_other_part_and_each_seed():
    """One pair of four has not learned, and one of its seeds is better: an average alone would hide both."""
    distances = np.array(list(DISTANCES) * 40)
    share = {
        ("mlp", MAMBA): (1, 1),
        ("mlp", TRANSFORMER): (1, 1),
        ("msc", MAMBA): (0.5, 0.75),
        ("msc", TRANSFORMER): (1, 1),
    }
    runs = {
        Pair(*pair, seed): Result((np.arange(120) < 120 * shares[seed]) * 1.0, np.zeros(120), 9, 0.0, 0.0)
        for pair, shares in share.items()
        for seed in (0, 1)
    }
    found = results(runs, distances)
    effects = {(e["to"], *e["beside"]): (e["scores"]["overall"]["value"], e["seeds"]) for e in found["effects"]}
    assert effects == {
        ("msc", MAMBA): (pytest.approx(-0.375), pytest.approx([-0.5, -0.25])),
        ("msc", TRANSFORMER): (0, [0, 0]),
        ("msc", MAMBA, TRANSFORMER): (pytest.approx(-0.1875), pytest.approx([-0.25, -0.125])),
        (TRANSFORMER, "mlp"): (0, [0, 0]),
        (TRANSFORMER, "msc"): (pytest.approx(0.375), pytest.approx([0.5, 0.25])),
        (TRANSFORMER, "mlp", "msc"): (pytest.approx(0.1875), pytest.approx([0.25, 0.125])),
    }
    shown = table(found).splitlines()
    assert any("mlp -> msc, mamba2" in line and line.endswith("-50.0 -25.0") for line in shown)
    assert any(line.startswith("msc") and line.endswith("50.0 75.0") for line in shown)
