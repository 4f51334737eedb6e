"""Scores of weighted items. Weights are counts, so a bootstrap sample is a weighting; what has no items is NaN.

All take arrays (n,): `weights` >= 0, `positive` and `said` of 0 and 1, `value` and `probability` of floats.
"""

import numpy as np


def mean(value: np.ndarray, weights: np.ndarray) -> float:
    """Weighted mean."""
    total = weights.sum()
    return float(value @ weights / total) if total else float("nan")


def means_by_type(table: dict[str, np.ndarray], weights: np.ndarray, column: str = "score") -> dict[str, float]:
    """Mean of a column for each type of question."""
    return {
        str(kind): mean(table[column][where], weights[where])
        for kind in np.unique(table["type"])
        for where in [table["type"] == kind]
    }


def precision_recall_f1(positive: np.ndarray, said: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall and F1 of the positive class; 0 where nothing was said or there to say, as usual."""
    hits = float((positive * said) @ weights)
    claimed, there = float(said @ weights), float(positive @ weights)
    if not weights.sum():
        return (float("nan"),) * 3
    return (
        hits / claimed if claimed else 0.0,
        hits / there if there else 0.0,
        2 * hits / (claimed + there) if claimed + there else 0.0,
    )


def average_precision(positive: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> float:
    """Area under precision over recall as a sum of steps: sum of (R_k - R_{k-1}) P_k over falling thresholds.

    Items of one probability share a threshold. NaN without a positive item.
    """
    found, false = _counts(positive, probability, weights)
    if not len(found) or not found[-1]:
        return float("nan")
    claimed = found + false
    precision = np.divide(found, claimed, out=np.zeros_like(found), where=claimed > 0)
    return float(np.diff(found, prepend=0.0) @ precision / found[-1])


def roc_auc(positive: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> float:
    """Chance that a positive item has a higher probability than a negative one, ties half. NaN without one of them."""
    found, false = _counts(positive, probability, weights)
    if not len(found) or not found[-1] or not false[-1]:
        return float("nan")
    steps = np.diff(false, prepend=0.0)
    middle = found - np.diff(found, prepend=0.0) / 2
    return float(steps @ middle / (found[-1] * false[-1]))


def _counts(positive: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positive and of negative items at or above each distinct probability, highest first."""
    order = np.argsort(-probability, kind="stable")
    last = np.flatnonzero(np.diff(probability[order], append=-np.inf))
    hit = positive[order] * weights[order]
    return np.cumsum(hit)[last], np.cumsum(weights[order] - hit)[last]
