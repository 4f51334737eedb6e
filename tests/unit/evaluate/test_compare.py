"""Intervals of whole evaluations and paired comparisons, on rows as an evaluation leaves them."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.evaluations import pope_rows, vqa_rows
from workflows.errors import UsageError
from workflows.evaluate import intervals as module
from workflows.evaluate.compare import compare
from workflows.evaluate.intervals import find_intervals
from workflows.evaluate.results import Answered, columns, measure

VQA, POPE = {"benchmark": "gqa", "model": "a"}, {"benchmark": "pope", "model": "a"}


def test_every_score_gets_an_interval_around_it_and_flat_names_for_the_gate():
    rows = vqa_rows()
    found = find_intervals(VQA, rows)
    scores, blind = measure("gqa", columns(rows)), measure("gqa", columns(rows, blind=True))
    for name, value in scores.items():
        assert found.scores[name].value == pytest.approx(value)
        assert found.scores[name].low < value < found.scores[name].high
        assert found.blind[name].value == pytest.approx(blind[name])
    margin = found.scores["margin_over_blind"]
    assert margin.value == pytest.approx(scores["overall"] - blind["overall"])
    assert found.margins["shape"].value == pytest.approx(scores["shape"] - blind["shape"])
    assert found.flat()["overall/low"] == found.scores["overall"].low
    assert {"colour/high", "shape/low", "margin_over_blind/low"} <= found.flat().keys()


def test_means_are_recognised_and_give_what_measuring_every_draw_gives(monkeypatch):
    rows = vqa_rows()
    quick = find_intervals(VQA, rows, resamples=300)
    monkeypatch.setattr(module, "_as_means", lambda *_: None)
    slow = find_intervals(VQA, rows, resamples=300)
    assert quick.scores.keys() == slow.scores.keys()
    for name, interval in quick.scores.items():
        assert (interval.low, interval.high) == pytest.approx((slow.scores[name].low, slow.scores[name].high))
    for name, interval in quick.blind.items():
        assert (interval.low, interval.high) == pytest.approx((slow.blind[name].low, slow.blind[name].high))


def test_f1_and_areas_have_intervals_too():
    rows = pope_rows()
    found = find_intervals(POPE, rows, resamples=200)
    scores = measure("pope", columns(rows))
    assert found.blind == found.margins == {}
    for name in ("overall", "f1", "roc_auc", "random", "text/f1", "f1/popular"):
        assert found.scores[name].value == pytest.approx(scores[name])
        assert found.scores[name].low < scores[name] < found.scores[name].high


def test_a_score_that_is_a_mean_by_chance_is_not_taken_for_one():
    """All right: F1 is 1 as accuracy is. The other model's is not, so its own F1 has to be measured."""
    perfect = [replace(row, score=1.0, text_score=1.0, p_yes=float(row.details["positive"])) for row in pope_rows()]
    other = pope_rows()
    found = compare(POPE, perfect, POPE, other, resamples=50)
    assert found.scores["f1"].second == pytest.approx(measure("pope", columns(other))["f1"])
    assert found.scores["f1"].interval.value == pytest.approx(found.scores["f1"].second - found.scores["f1"].first)


def test_a_paired_interval_is_narrower_than_the_two_alone_and_finds_a_small_gain():
    first = vqa_rows(seed=1, images=300)
    rng = np.random.default_rng(5)
    second = [
        replace(row, score=1.0 if row.score == 0 and rng.random() < 0.08 else row.score, prediction="x")
        for row in first
    ]
    found = compare(VQA, first, VQA | {"model": "b"}, second[::-1])
    difference = found.scores["overall"]
    assert difference.clear
    assert difference.interval.low > 0
    alone = [find_intervals(VQA, rows).scores["overall"] for rows in (first, second)]
    assert difference.interval.high - difference.interval.low < 0.5 * min(one.high - one.low for one in alone)
    assert found.worse == 0
    assert found.better == sum(a.score != b.score for a, b in zip(first, second, strict=True))
    assert found.as_dict()["difference"]["overall/low"] == difference.interval.low
    assert "overall" in found.text()


def test_the_same_answers_twice_are_not_told_apart():
    rows = vqa_rows()
    found = compare(VQA, rows, VQA, rows)
    difference = found.scores["overall"]
    assert not difference.clear
    assert difference.interval.low < 0 < difference.interval.high
    assert "not told apart" in found.text()


def test_the_paired_interval_holds_the_true_difference_as_often_as_it_says():
    held, studies = 0, 200
    for study in range(studies):
        rng = np.random.default_rng(study)
        chance = rng.beta(2, 1, size=60)  # of a right answer, by image; the second model's is 0.9 of it
        rows = {}
        for model, factor in (("a", 1.0), ("b", 0.9)):
            rows[model] = [
                Answered(f"{i}/{k}", "?", "x", ["x"], "all", "x", float(rng.random() < factor * p), image=str(i))
                for i, p in enumerate(chance)
                for k in range(2)
            ]
        found = compare(VQA, rows["a"], VQA, rows["b"], resamples=300, seed=study)
        interval = found.scores["overall"].interval
        held += interval.low <= (0.9 - 1) * 2 / 3 <= interval.high
    assert 0.90 <= held / studies <= 0.99


def test_other_items_are_refused_by_name():
    rows = vqa_rows(images=12)
    with pytest.raises(UsageError, match=r"2 items are in the first only \(0/0, 0/1\); 1 items are in the second only"):
        compare(VQA, rows, VQA, [*rows[2:], replace(rows[0], id="new")])
    with pytest.raises(UsageError, match=r"1 items ask something else or have other references \(3/1\)"):
        compare(VQA, rows, VQA, [replace(row, answers=["green"]) if row.id == "3/1" else row for row in rows])
    with pytest.raises(UsageError, match="twice"):
        compare(VQA, rows, VQA, [*rows, rows[0]])
    with pytest.raises(UsageError, match="gqa cannot be compared with pope"):
        compare(VQA, rows, POPE, rows)
