"""The gate: thresholds, and no regression against the version that holds the alias."""

import math

import pytest
from pydantic import ValidationError

from workflows.recipe.evaluate import Gate
from workflows.registry import gate_failures


def test_it_names_what_is_too_low_too_high_or_missing():
    gate = Gate(least={"overall": 0.9, "colour": 0.85, "shape": 0.5}, most={"invented": 0.1, "unsure": 0.1})
    failures = gate_failures(gate, {"overall": 0.95, "colour": 0.5, "invented": 0.2})
    assert failures == [
        "colour is 0.5, at least 0.85 is wanted",
        "shape was not measured, at least 0.5 is wanted",
        "invented is 0.2, at most 0.1 is wanted",
        "unsure was not measured, at most 0.1 is wanted",
    ]


def test_not_a_number_never_passes():
    gate = Gate(least={"a": 0.0}, most={"b": 1.0}, margin={"c": 1.0})
    scores = dict.fromkeys("abc", math.nan)
    assert len(gate_failures(gate, scores, {"c": 0.5})) == 3


@pytest.mark.parametrize(
    ("value", "holder", "passes"), [(0.90, 0.91, True), (0.899, 0.91, False), (0.95, 0.91, True), (0.5, None, True)]
)
def test_a_score_may_be_worse_than_the_holders_by_the_margin(value, holder, passes):
    gate = Gate(margin={"overall": 0.01})
    failures = gate_failures(gate, {"overall": value}, None if holder is None else {"overall": holder})
    assert (failures == []) == passes, failures


def test_where_less_is_better_worse_means_more():
    gate = Gate(most={"invented": 0.5}, margin={"invented": 0.01})
    assert gate_failures(gate, {"invented": 0.10}, {"invented": 0.30}) == []
    assert gate_failures(gate, {"invented": 0.32}, {"invented": 0.30}) == [
        "invented is 0.32, the present holder has 0.3: 0.02 worse, at most 0.01 is allowed"
    ]


def test_a_score_that_the_holder_lacks_is_not_compared_and_one_that_is_missing_here_fails():
    gate = Gate(margin={"new": 0.0, "old": 0.0})
    assert gate_failures(gate, {"new": 0.1, "old": 0.9}, {"old": 0.9}) == []
    assert gate_failures(gate, {"new": 0.1}, {"old": 0.9}) == ["old was not measured, the present holder has 0.9"]


def test_scores_on_other_questions_are_not_compared():
    (failure,) = gate_failures(Gate(margin={"a": 0.1}), {"a": 0.9}, {"a": 0.1}, same_questions=False)
    assert "other questions" in failure
    assert gate_failures(Gate(least={"a": 0.5}), {"a": 0.9}, {"a": 0.1}, same_questions=False) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"overall": 0.9}, "thresholds go under least: write gate: {least: {overall: 0.9}}"),
        ({"margin": {"overall": -0.1}}, "margin.overall = -0.1"),
        ({"least": {"a": 0.5}, "most": {"a": 0.4}}, "a: least = 0.5 is over most = 0.4"),
    ],
)
def test_a_gate_that_cannot_be_meant_says_so(content, message):
    with pytest.raises(ValidationError) as error:
        Gate.model_validate(content)
    assert message in str(error.value)
