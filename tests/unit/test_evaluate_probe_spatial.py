"""Spatial questions say what the pictures show, and cannot be answered without them."""

from collections import Counter

import numpy as np
import pytest

from tests.spatial_pictures import COLOURS, DISTANCES, LINES, RELATIONS, SIDE, WORDS, draw_questions

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
    for one in made:
        colour, relation, colour2 = one.question[2], one.question[4], one.question[7]
        axis, sign = RELATIONS[relation]
        apart = (centre(one.picture, colour) - centre(one.picture, colour2))[axis]
        assert (apart * sign > 0) == (one.answer == "yes")
        low, high = DISTANCES[one.distance]
        assert low - 1 <= abs(apart) <= high + 1


def test_lessons_say_what_the_pixels_say_and_agree_with_the_question(made):
    for one in made:
        places, relations = one.lessons()
        assert (len(places), len(relations)) == (4, 8)
        assert (one.question, one.answer) in relations
        for asked, line in places:
            x, y = centre(one.picture, asked[7])
            where = x if "columns" in asked else y
            assert abs(where - (LINES.index(line) + 0.5) * SIDE / 4) <= SIDE / 8 + 1
        assert {len(asked) for asked, _ in places + relations} == {len(one.question)}
        assert {word for asked, answer in places + relations for word in (*asked, answer)} <= set(WORDS)


def test_no_relation_distance_or_word_gives_the_answer_away(made):
    for key in (lambda one: (one.question[4], one.distance), lambda one: one.distance):
        counts = Counter((key(one), one.answer) for one in made)
        assert all(counts[group, "yes"] == counts[group, "no"] for group, _ in counts)
    yes = np.array([one.answer == "yes" for one in made])
    for place in (2, 4, 7):
        for word in {one.question[place] for one in made}:
            share = yes[[one.question[place] == word for one in made]].mean()
            assert 0.3 < share < 0.7


def test_the_two_shapes_differ_and_the_words_are_known(made):
    for one in made:
        assert one.picture.size == (SIDE, SIDE)
        assert one.question[2] != one.question[7]
        assert set(one.question) | {one.answer} <= set(WORDS)


def test_the_seed_decides(made):
    again = draw_questions(COUNT, seed=3)
    assert [(o.question, o.answer, o.picture.tobytes()) for o in again] == [
        (o.question, o.answer, o.picture.tobytes()) for o in made
    ]
    assert [o.question for o in draw_questions(COUNT, seed=4)] != [o.question for o in made]
