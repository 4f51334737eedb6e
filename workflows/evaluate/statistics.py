"""Scores of answers and their bootstrap intervals, with whole images as the unit.

Questions about one image share that image: when a model misreads it, several answers fall together. Resampling
single questions would call such a score surer than it is, so images (clusters) are drawn, with all their questions.
A resample is a vector of counts, how often each image was drawn, and a score is a function of those counts.

The interval is BCa, bias-corrected and accelerated (Efron 1987, "Better bootstrap confidence intervals"), from
scipy.stats.bootstrap: scores near 0 or 1 have skewed errors, which the percentile interval does not follow. The seed is
fixed, so the same answers give the same interval. With fewer than some 30 images every bootstrap interval is too
narrow; `Interval.images` says how many there were.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

RESAMPLES, SEED, LEVEL = 2000, 7, 0.95
MOST_BCA = 5000
"""Images up to which the interval is BCa. Its correction for skew shrinks with their number, while its cost, leaving
out every image in turn, grows with the square of it: beyond, the percentile interval is the same to three digits."""
_CHUNK_NUMBERS = 4_000_000  # counts held at once
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
        raise ValueError(f"{images} images: a bootstrap needs at least one image")
    values = statistic(np.ones((1, images)))[0]
    ends = _intervals(statistic, images, len(values), level, resamples, seed)
    counted = [images] * len(values) if counted is None else counted
    bounds = [(0.0, 1.0)] * len(values) if bounds is None else bounds
    intervals = []
    for value, (low, high), count, bound in zip(values, ends, counted, bounds, strict=True):
        if not high - low >= _EQUAL:
            low, high = _ends_of_equal_draws(value, level, max(1, count), bound)
        intervals.append(Interval(float(value), float(low), float(high), count))
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


def _intervals(
    statistic: Statistic, images: int, scores: int, level: float, resamples: int, seed: int
) -> list[tuple[float, float]]:
    """The ends of every score's interval, from scipy; NaN where the draws do not vary.

    A draw that leaves a score undefined (none of the images of its type was drawn) does not count for that score.
    """
    if images < 2:
        return [(np.nan, np.nan)] * scores

    def of_drawn(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        """Numbers of images (..., k) -> scores (T, ...)."""
        rows = drawn.reshape(-1, drawn.shape[-1])
        bins = rows + images * np.arange(len(rows))[:, None]
        counts = np.bincount(bins.ravel(), minlength=len(rows) * images).reshape(len(rows), images)
        return statistic(counts.astype(np.float64)).T.reshape(-1, *drawn.shape[:-1])

    method = "BCa" if images <= MOST_BCA else "percentile"
    batch = max(1, _CHUNK_NUMBERS // images)
    options = {"confidence_level": level, "vectorized": True, "batch": batch, "method": method}
    numbers = (np.arange(images),)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        rng = np.random.default_rng(seed)
        result = stats.bootstrap(numbers, of_drawn, n_resamples=resamples, rng=rng, **options)
        ends = list(zip(*result.confidence_interval, strict=True))
        for i, draws in enumerate(result.bootstrap_distribution):
            defined = draws[~np.isnan(draws)]
            if 0 < len(defined) < len(draws):
                one = stats.bootstrap(
                    numbers,
                    lambda drawn, axis=-1, i=i: of_drawn(drawn)[i],
                    n_resamples=0,
                    bootstrap_result=replace(result, bootstrap_distribution=defined),
                    **options,
                )
                ends[i] = tuple(one.confidence_interval)
    return ends


def _ends_of_equal_draws(value: float, level: float, count: int, bounds: tuple[float, float]) -> tuple[float, float]:
    """The ends where (nearly) all draws give the same score: what `count` equal draws leave possible.

    Written here because a bootstrap of equal draws has no width (scipy gives NaN), which would call 20 right answers
    of 20 certain. For a share of 0 or 1 this is the exact binomial interval (Clopper and Pearson 1934).
    """
    unseen = 1 - ((1 - level) / 2) ** (1 / count)
    return value - unseen * (value - bounds[0]), value + unseen * (bounds[1] - value)


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
    """Precision, recall and F1 of the positive class; 0 where nothing was said or there to say, as usual.

    Written here because a bootstrap calls it thousands of times, and scikit-learn's checks of its input take about a
    thousand times as long as these sums.
    """
    if not weights.sum():
        return (float("nan"),) * 3
    hits = float((positive * said) @ weights)
    claimed, there = float(said @ weights), float(positive @ weights)
    return (
        hits / claimed if claimed else 0.0,
        hits / there if there else 0.0,
        2 * hits / (claimed + there) if claimed + there else 0.0,
    )


def average_precision(positive: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> float:
    """Area under precision over recall as a sum of steps: sum of (R_k - R_{k-1}) P_k over falling thresholds.

    Items of one probability share a threshold. NaN without a positive item. Written here, as is `roc_auc`, because a
    bootstrap calls it for every draw: sklearn.metrics gives the same (a test compares them) and takes eight times as
    long for its checks of the input.
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
