"""Bootstrap intervals of scores, with whole images as the unit.

Questions about one image share that image: when a model misreads it, several answers fall together. Resampling
single questions would call such a score surer than it is, so images (clusters) are drawn, with all their questions.
A resample is a vector of counts, how often each image was drawn, and a score is a function of those counts.

The interval is BCa, bias-corrected and accelerated (Efron 1987, "Better bootstrap confidence intervals"): scores near 0
or 1 have skewed errors, which the percentile interval does not follow. Where (nearly)
all draws give the same score, the bootstrap says nothing; then the interval is what that many equal draws still leave
possible (for a share of 0 or 1: Clopper and Pearson 1934). Seeded, so the same answers give the same interval.
With fewer than some 30 images every bootstrap interval is too narrow; `Interval.images` says how many there were.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES, SEED, LEVEL = 2000, 7, 0.95
_CHUNK_NUMBERS = 4_000_000  # counts held at once
_GROUPS = 200  # of images left out together, for the acceleration
_EQUAL = 1e-12

Statistic = Callable[[np.ndarray], np.ndarray]
"""Counts of images (r, k) -> scores (r, T); NaN where a count leaves a score undefined."""


@dataclass(frozen=True)
class Interval:
    """A score, its interval, and how many images it rests on."""

    value: float
    low: float
    high: float
    images: int


def bootstrap(
    statistic: Statistic,
    images: int,
    *,
    counted: Sequence[int] | None = None,
    bounds: Sequence[tuple[float, float]] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[Interval]:
    """Intervals of the T scores that `statistic` makes.

    Args:
        statistic: see `Statistic`.
        images: how many images there are (k).
        counted: how many of them each score rests on; all, by default.
        bounds: for each score the least and greatest value that one image may give it; 0 and 1, by default.
        level: share of repetitions of the whole study whose interval holds the true value.
        resamples: draws of k images.

    Raises:
        ValueError: there are no images.
    """
    if images < 1:
        raise ValueError("a bootstrap needs at least one image")
    values = statistic(np.ones((1, images)))[0]
    draws, left_out = _resample(statistic, images, resamples, seed), _leave_out(statistic, images)
    counted = [images] * len(values) if counted is None else counted
    bounds = [(0.0, 1.0)] * len(values) if bounds is None else bounds
    intervals = []
    for i, value in enumerate(values):
        low, high = _ends(value, draws[:, i], left_out[:, i], level, max(1, counted[i]), bounds[i])
        intervals.append(Interval(float(value), low, high, counted[i]))
    return intervals


def ratios(above: np.ndarray, below: np.ndarray, index: np.ndarray) -> Statistic:
    """The statistic of scores that are a ratio of two sums over items: accuracies, differences of them, F1, rates.

    Args:
        above, below: (n, T), what is summed up over n items for each of T scores, and what that is divided by.
        index: (n,) image of every item, from `number`.
    """
    sums = np.zeros((2, int(index.max()) + 1, above.shape[1]))
    np.add.at(sums[0], index, above)
    np.add.at(sums[1], index, below)

    def statistic(counts: np.ndarray) -> np.ndarray:
        divisor = counts @ sums[1]
        return np.divide(counts @ sums[0], divisor, out=np.full_like(divisor, np.nan), where=divisor != 0)

    return statistic


def number(clusters: Sequence[Hashable]) -> np.ndarray:
    """(n,) clusters numbered in the order of their first item, so that intervals do not depend on their names."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(cluster, len(seen)) for cluster in clusters], dtype=np.int64)


def _resample(statistic: Statistic, images: int, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    step, values = max(1, _CHUNK_NUMBERS // images), []
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        drawn = rng.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images)
        values.append(statistic(counts.astype(np.float64)))
    return np.concatenate(values)


def _leave_out(statistic: Statistic, images: int) -> np.ndarray:
    """Jackknife: the scores without one image, or where there are many, without one of `_GROUPS` groups of them."""
    groups = np.arange(images) % min(images, _GROUPS)
    return statistic((groups[None, :] != np.arange(groups.max() + 1)[:, None]).astype(np.float64))


def _ends(
    value: float, draws: np.ndarray, left_out: np.ndarray, level: float, count: int, bounds: tuple[float, float]
) -> tuple[float, float]:
    draws, left_out = draws[~np.isnan(draws)], left_out[~np.isnan(left_out)]
    if np.isnan(value) or not len(draws):
        return float("nan"), float("nan")
    tail, low, high = (1 - level) / 2, value, value
    if len(left_out) and np.ptp(draws) > _EQUAL:
        low, high = np.quantile(draws, _bca(value, draws, left_out, tail))
    if high - low < _EQUAL:
        unseen = 1 - tail ** (1 / count)
        low, high = value - unseen * (value - bounds[0]), value + unseen * (bounds[1] - value)
    return float(low), float(high)


def _bca(value: float, draws: np.ndarray, left_out: np.ndarray, tail: float) -> list[float]:
    """The shares of the draws that lie below the interval's ends, corrected for bias and skew (Efron 1987)."""
    normal, near = NormalDist(), 1 / len(draws)
    equal = np.abs(draws - value) < _EQUAL
    below = (np.sum((draws < value) & ~equal) + 0.5 * np.sum(equal)) / len(draws)
    bias = normal.inv_cdf(min(max(below, near), 1 - near))
    away = left_out.mean() - left_out
    spread = np.sum(away**2)
    acceleration = np.sum(away**3) / (6 * spread**1.5) if spread > _EQUAL**2 else 0.0
    ends = (bias + normal.inv_cdf(tail), bias + normal.inv_cdf(1 - tail))
    return [normal.cdf(bias + z / max(1 - acceleration * z, _EQUAL)) for z in ends]


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
