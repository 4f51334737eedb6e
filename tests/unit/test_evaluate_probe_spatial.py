"""Spatial questions say what the pictures show, and cannot be answered without them."""

from collections import Counter

import numpy as np
import pytest

from tests.spatial_pictures import COLOURS, DISTANCES, RELATIONS, SIDE, WORDS, draw_questions

COUNT = 480


@pytest.fixture(scope="module")
def made():
    return draw_questions(COUNT, seed=3)


def centre(picture, colour: str) -> np.ndarray:
    """Middle of the box around a colour's pixels, (x, y)."""
    pixels = np.asarray(picture).astype(int)
    wanted = [int(COLOURS[colour][i : i + 2], 16) for i in (1, 3, 5)]
    ys, xs = np.nonzero(np.abs(pixels - wanted).sum(-1) < 20)
    return np.array([(xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2])


def test_the_answer_is_what_the_pixels_say(made):
    looked_at = 0
    for one in made:
        colour, relation, colour2 = one.question[2], one.question[4], one.question[7]
        if colour == colour2:
            continue  # the two shapes' pixels cannot be told apart by colour
        looked_at += 1
        axis, sign = RELATIONS[relation]
        apart = (centre(one.picture, colour) - centre(one.picture, colour2))[axis]
        assert (apart * sign > 0) == (one.answer == "yes")
        low, high = DISTANCES[one.distance]
        assert low - 1 <= abs(apart) <= high + 1
    assert looked_at > COUNT // 2


def test_no_relation_distance_or_word_gives_the_answer_away(made):
    for key in (lambda one: (one.question[4], one.distance), lambda one: one.distance):
        counts = Counter((key(one), one.answer) for one in made)
        assert all(counts[group, "yes"] == counts[group, "no"] for group, _ in counts)
    yes = np.array([one.answer == "yes" for one in made])
    for place in (2, 3, 7, 8):
        for word in {one.question[place] for one in made}:
            share = yes[[one.question[place] == word for one in made]].mean()
            assert 0.3 < share < 0.7


def test_the_two_shapes_differ_and_the_words_are_known(made):
    for one in made:
        assert one.picture.size == (SIDE, SIDE)
        assert one.question[2:4] != one.question[7:9]
        assert set(one.question) | {one.answer} <= set(WORDS)


def test_the_seed_decides(made):
    again = draw_questions(COUNT, seed=3)
    assert [(o.question, o.answer, o.picture.tobytes()) for o in again] == [
        (o.question, o.answer, o.picture.tobytes()) for o in made
    ]
    assert [o.question for o in draw_questions(COUNT, seed=4)] != [o.question for o in made]
