"""Scores, baselines and the gate."""

import pytest

from pipelines.config import EasyVQASource
from workflows.evaluate.questions import load_questions, majority_answer
from workflows.evaluate.runner import derangement
from workflows.evaluate.score import accuracy_by_type, table
from workflows.registry import gate_failures

pytest.importorskip("easy_vqa")


def test_accuracy_overall_and_by_type():
    scores = accuracy_by_type(["Yes.", "no", " RED "], ["yes", "yes", "red"], ["yes/no", "yes/no", "colour"])
    assert scores == {"overall": pytest.approx(2 / 3), "yes/no": 0.5, "colour": 1.0}


def test_an_incomplete_set_has_no_score():
    with pytest.raises(ValueError, match="1 predictions, 2 answers"):
        accuracy_by_type(["yes"], ["yes", "no"], ["a", "a"])


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_blind_question_never_keeps_its_picture(count):
    order = derangement(count, seed=7)
    assert sorted(order) == list(range(count))
    assert all(i != j for i, j in enumerate(order))


def test_the_official_test_split_is_whole_and_typed():
    pictures = load_questions([EasyVQASource(type="easy_vqa", split="test")])
    assert len(pictures) == 1000
    types = [kind for picture in pictures for kind in picture.types]
    assert {kind: types.count(kind) for kind in set(types)} == {"yes/no": 7136, "colour": 1280, "shape": 1257}
    ids = [key for picture in pictures for key in picture.ids]
    assert len(set(ids)) == len(ids) == 9673


def test_training_never_sees_a_test_or_validation_picture():
    pictures = {
        split: {p.location for p in load_questions([EasyVQASource(type="easy_vqa", split=split)])}
        for split in ("train", "validation", "test")
    }
    assert [len(pictures[split]) for split in ("train", "validation", "test")] == [3700, 300, 1000]
    assert len(set.union(*pictures.values())) == 5000


def test_the_majority_answer_comes_from_the_training_split():
    assert majority_answer([EasyVQASource(type="easy_vqa", split="train")]) == "yes"


def test_the_gate_names_what_is_too_low_or_missing():
    failures = gate_failures({"overall": 0.9, "colour": 0.85, "shape": 0.5}, {"overall": 0.95, "colour": 0.5})
    assert failures == ["colour is 50.0%, 85.0% is wanted", "shape was not measured, 50.0% is wanted"]


def test_the_table_shows_each_score_beside_its_baselines():
    scores = {"overall": 0.9, "colour": 0.8}
    text = table(
        {
            "scores": scores | {"margin_over_blind": 0.4},
            "blind": {"overall": 0.5, "colour": 0.1},
            "majority": {"overall": 0.4, "colour": 0.0},
            "majority_answer": "yes",
            "questions": {"overall": 1234, "colour": 200},
        }
    )
    assert text.splitlines()[1].split() == ["overall", "1,234", "90.0%", "50.0%", "40.0%"]
