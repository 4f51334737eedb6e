"""Weighted scores by hand and beside scikit-learn's, and what they give where there is nothing to measure."""

import math

import numpy as np
import pytest
from sklearn import metrics

from workflows.evaluate.statistics import average_precision, mean, means_by_type, precision_recall_f1, roc_auc


def test_precision_recall_and_f1_are_scikit_learns_also_with_weights():
    rng = np.random.default_rng(0)
    for _ in range(20):
        positive, said = rng.integers(0, 2, (2, 40)).astype(float)
        weights = rng.integers(0, 4, 40).astype(float)
        theirs = metrics.precision_recall_fscore_support(
            positive, said, average="binary", zero_division=0, sample_weight=weights
        )
        assert precision_recall_f1(positive, said, weights) == pytest.approx(theirs[:3], abs=1e-15)


def test_a_weight_of_two_is_the_item_twice():
    positive, chance = np.array([1.0, 0, 1, 0]), np.array([0.9, 0.8, 0.3, 0.1])
    weights = np.array([1.0, 2, 3, 0])
    index = np.repeat(np.arange(4), weights.astype(int))
    for score in (average_precision, roc_auc):
        assert score(positive, chance, weights) == pytest.approx(score(positive[index], chance[index], np.ones(6)))
    assert mean(chance, weights) == pytest.approx(chance[index].mean())


def test_by_hand():
    """Thresholds 0.9, 0.8, 0.3: precisions 1, 1/2, 2/3; recall rises by 1/2 at the first and the last."""
    positive, chance, once = np.array([1.0, 0, 1]), np.array([0.9, 0.8, 0.3]), np.ones(3)
    assert average_precision(positive, chance, once) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert roc_auc(positive, chance, once) == pytest.approx(0.5)
    assert precision_recall_f1(positive, np.array([1.0, 1, 0]), once) == pytest.approx((0.5, 0.5, 0.5))


def test_nothing_to_measure_is_not_a_number_and_nothing_said_is_zero():
    nothing, some = np.zeros(3), np.array([0.2, 0.4, 0.6])
    assert math.isnan(mean(some, nothing))
    assert math.isnan(average_precision(nothing, some, np.ones(3)))
    assert math.isnan(roc_auc(np.ones(3), some, np.ones(3)))
    assert precision_recall_f1(np.ones(3), nothing, np.ones(3)) == (0.0, 0.0, 0.0)
    assert math.isnan(precision_recall_f1(np.ones(3), nothing, nothing)[2])


def test_means_by_type():
    table = {"score": np.array([1.0, 0.0, 0.6]), "type": np.array(["a", "a", "b"])}
    assert means_by_type(table, np.array([3.0, 1, 1])) == {"a": 0.75, "b": pytest.approx(0.6)}
