"""Answers by VQA's and M4C's rules, worked by hand from their descriptions, and beside outside implementations."""

import pytest

from tests.benchmarks.studies.score_parity import answers, compare, find_lmms_eval, find_m4c, gqa_score
from workflows.evaluate.benchmarks.gqa import normalise_gqa
from workflows.evaluate.benchmarks.pope import POPE
from workflows.evaluate.benchmarks.vqav2 import (
    leave_one_out,
    m4c_score,
    most_frequent,
    normalise_m4c,
    normalise_vqa,
    script_score,
    vqa_score,
)
from workflows.evaluate.benchmarks.vsr import VSR


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("Yes", "yes"),
        (" A red\nball ", "red ball"),  # article, newline, outer space
        ("The", ""),
        ("two", "2"),
        ("none", "0"),
        ("red, blue", "red blue"),  # the comma stands beside a space: dropped
        ("red,blue", "red blue"),  # it does not: a space
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),  # one hyphen beside a space: all hyphens dropped
        ("1,000", "1000"),  # a comma between digits: every mark dropped
        ("1,000 t-shirts", "1000 tshirts"),
        ("3.5 m.", "3.5 m"),  # a full stop goes unless a digit follows
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # as the published table has it
        ("Im", "im"),  # the table has it in upper case, where lower case never finds it
        ("it's", "it's"),
        ("?", ""),
        ("", ""),
        ("." * 40, "." * 8),  # the published code drops no more than 32
        ("É", "é"),
    ],
)
def test_vqas_rules(said, normal):
    assert normalise_vqa(said) == normal


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("Nokia's", "nokia 's"),
        ("red,blue", "redblue"),  # commas go before anything else
        ("what?no", "whatno"),
        ("1,000 t-shirts", "1000 t shirts"),  # so no comma between digits is left to drop the hyphen
    ],
)
def test_m4cs_rules_where_they_differ(said, normal):
    assert normalise_m4c(said) == normal


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_an_answer_of_so_many_people(matches, accuracy):
    """1: nine times 1/3, once nothing: 9 x 1/3 / 10. 2: (2 x 1/3 + 8 x 2/3) / 10. 3: (3 x 2/3 + 7) / 10."""
    assert leave_one_out(matches) == pytest.approx(accuracy)


def test_leaving_out_one_at_a_time_by_hand():
    for people in (1, 3, 10):
        for matches in range(people + 1):
            given = [True] * matches + [False] * (people - matches)
            left = [min(1, (sum(given) - one) / 3) for one in given]
            assert leave_one_out(matches, people) == pytest.approx(sum(left) / people)
    with pytest.raises(ValueError, match="11 of 10 people"):
        leave_one_out(11)


def test_both_sides_are_normalised_and_the_script_is_not_where_all_agree():
    assert vqa_score("Yes.", ["yes"] * 10) == 1.0
    assert script_score("Yes.", ["yes"] * 10) == 0.0
    assert script_score("yes", ["yes"] * 10) == 1.0
    assert script_score("Yes.", ["yes"] * 9 + ["no"]) == 1.0  # they do not all agree, so both sides are normalised
    assert vqa_score("2", ["two"] * 2 + ["Two!"] + ["three"] * 7) == pytest.approx(0.9)
    assert m4c_score("a Nokia", ["nokia"] * 1 + ["samsung"] * 9) == pytest.approx(0.3)
    assert vqa_score("", ["yes"] * 10) == 0.0


def test_the_most_frequent_answer_is_the_first_of_several():
    assert most_frequent(["red", "blue", "blue", "red", "green"]) == "red"


def test_gqa_ignores_punctuation_and_case():
    assert normalise_gqa(" T-Shirt. ") == "tshirt" == normalise_gqa("t-shirt")
    assert gqa_score("bed", ["beds"]) == 0.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", 1),
        ("No", 0),
        ("no, there is not", 0),
        ("There is not a dog.", 0),
        ("Yes. No", 1),  # only the first sentence counts
        ("NO", 1),  # the rule knows "No" and "no"
        ("Nothing", 1),
        ("", 1),
        ("No,", 0),
    ],
)
def test_how_pope_reads_an_answer(text, said):
    assert POPE.said(None, text) == said


@pytest.mark.parametrize(
    ("text", "said"), [("True", 1), ("false.", 0), ("It is True", 1), ("untrue", None), ("", None), ("False, true", 0)]
)
def test_how_a_statement_is_called_true(text, said):
    assert VSR.said(None, text) == said


def test_the_same_scores_as_llavas_m4c_evaluator():
    theirs = find_m4c(None) or pytest.skip("llava-torch is not installed")
    cases = list(answers(2000))
    assert compare(m4c_score, theirs, cases) == (len(cases), "")


@pytest.mark.parametrize(("task", "ours"), [("vqav2", vqa_score), ("textvqa", m4c_score)])
def test_the_same_scores_as_lmms_evals_tasks(task, ours):
    theirs = find_lmms_eval(None).get(task) or pytest.skip("lmms-eval is not installed")
    cases = list(answers(2000))
    assert compare(ours, theirs, cases) == (len(cases), "")


def test_the_answers_to_compare_on_are_worth_comparing():
    scores = [vqa_score(prediction, people) for prediction, people in answers(500)]
    assert len({round(score, 3) for score in scores}) == 5  # 0, 0.3, 0.6, 0.9 and 1 all occur
    assert 0.2 < sum(scores) / len(scores) < 0.9
