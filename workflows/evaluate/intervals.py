"""Intervals of an evaluation's scores, whatever the benchmark.

All scores come from the benchmark's own `measure`, given how often each item was drawn, so F1, an area under a curve or
a mean over splits has an interval as an accuracy has. Most scores are plain means of a part of the items. Those are
recognised, by trying: a mean that agrees with `measure` under random weights is that score. Where all are means,
thousands of draws are one matrix product; else `measure` is called for every draw, and there are fewer draws.

And how far a model's Yes/No probabilities can be taken at their word: reliability by bins, ECE and Brier score. The
probability is that of the first choice (Yes, True) against the second as first token. Among the questions where it
is near 0.8, eight of ten should have the answer Yes. The expected calibration error (ECE) is the mean distance from
that over equal bins of probability, weighted by questions (Naeini et al. 2015, for a binary outcome); the Brier score
is the mean squared error of the probability, 0.25 for one that always says one half.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workflows.evaluate.results import MARGIN, OVERALL, Answered, columns, measure
from workflows.evaluate.statistics import RESAMPLES, SEED, Interval, Statistic, bootstrap, number, ratios

_TRIALS = 3  # random weightings under which a mean must agree
SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)


@dataclass(frozen=True)
class Intervals:
    """Intervals by the names of the scores; `blind` and `margins` are empty where nothing was asked blind."""

    scores: dict[str, Interval]
    blind: dict[str, Interval]
    margins: dict[str, Interval]
    """Of score - blind, in pairs. That of "overall" is also in `scores`, as margin_over_blind."""

    def flat(self) -> dict[str, float]:
        """The ends as a gate and MLflow name them: "overall/low", "overall/high", "margin_over_blind/low", ...

        Without those of scores that have none.
        """
        return {
            f"{name}/{end}": getattr(interval, end)
            for name, interval in self.scores.items()
            for end in ("low", "high")
            if not np.isnan(getattr(interval, end))
        }


def find_intervals(scores: dict, rows: Sequence[Answered], resamples: int | None = None, seed: int = SEED) -> Intervals:
    """95% intervals of every score of an evaluation, blind ones and the margin over blind included.

    The model's answers and its blind answers are drawn together: the interval of the margin is a paired one.

    Args:
        scores: content of scores.json; only `benchmark` is read.
        rows: the answered items.
        resamples: draws; by default 2000 where all scores are means, else 1000.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there are no answers to find intervals of")
    seeing = columns(rows)
    tables = [seeing] if any(row.blind_score is None for row in rows) else [seeing, columns(rows, blind=True)]
    drawn = Draws(scores["benchmark"], tables, rows)
    count = len(drawn.names)

    def statistic(counts: np.ndarray) -> np.ndarray:
        values = drawn.statistic(counts)
        return values if len(tables) == 1 else np.hstack([values, values[:, :count] - values[:, count:]])

    kinds = [SHARE] if len(tables) == 1 else [SHARE, SHARE, DIFFERENCE]
    found = bootstrap(
        statistic,
        drawn.images,
        counted=drawn.counted * len(kinds),
        bounds=[bounds for bounds in kinds for _ in range(count)],
        resamples=resamples or drawn.resamples,
        seed=seed,
    )
    own, *others = (dict(zip(drawn.names, found[i * count :], strict=False)) for i in range(len(kinds)))
    if not others:
        return Intervals(own, {}, {})
    blind, margins = others
    return Intervals(own | {MARGIN: margins[OVERALL]}, blind, margins)


class Draws:
    """The scores of one or several tables over the same items, as a function of how often each image is drawn.

    Attributes:
        names: of the scores of one table, as `measure` gives them.
        statistic: counts (r, k) -> (r, tables x names), one table after the other.
        images: how many there are (k).
        counted: for each name, how many images it rests on: those of its type of question (colour, f1/colour),
            all for what is of no type.
        resamples: how many draws are worth their time.
    """

    def __init__(self, benchmark: str, tables: list[dict[str, np.ndarray]], rows: Sequence[Answered]):
        self.names = list(measure(benchmark, tables[0]))
        index = number(clusters(rows))
        self.images = int(index.max()) + 1
        types = tables[0]["type"]
        by_type = {str(kind): len(np.unique(index[types == kind])) for kind in np.unique(types)}
        self.counted = [
            next((count for kind, count in by_type.items() if name == kind or name.endswith(f"/{kind}")), self.images)
            for name in self.names
        ]
        found = _as_means(benchmark, tables, self.names)
        self.resamples = RESAMPLES if found else RESAMPLES // 2
        if found:
            weights = np.column_stack([found[name][1] for name in self.names])
            values = [np.column_stack([table[found[name][0]] for name in self.names]) for table in tables]
            above = np.column_stack([np.where(weights > 0, value, 0.0) for value in values])
            self.statistic = ratios(above, np.tile(weights, len(tables)), index)
        else:
            self.statistic = self._one_by_one(benchmark, tables, index)

    def _one_by_one(self, benchmark: str, tables: list[dict[str, np.ndarray]], index: np.ndarray) -> Statistic:
        def statistic(counts: np.ndarray) -> np.ndarray:
            values = np.empty((len(counts), len(tables) * len(self.names)))
            for row, drawn in enumerate(counts):
                measured = [measure(benchmark, table, drawn[index]) for table in tables]
                values[row] = [scores.get(name, np.nan) for scores in measured for name in self.names]
            return values

        return statistic


def clusters(rows: Sequence[Answered]) -> list[tuple]:
    """The image of every row; a row without one stands alone."""
    return [(row.source, row.image) if row.image is not None else (row.id,) for row in rows]


def _as_means(
    benchmark: str, tables: Sequence[dict[str, np.ndarray]], names: Sequence[str]
) -> dict[str, tuple[str, np.ndarray]] | None:
    """For each score the column and the items (0 or 1) that it is the mean of; None if one of them is no mean."""
    types, rng = tables[0]["type"], np.random.default_rng(0)
    parts = {OVERALL: np.ones(len(types))} | {str(kind): (types == kind) * 1.0 for kind in np.unique(types)}
    trials = [(table, rng.random(len(types))) for table in tables for _ in range(_TRIALS)]
    measured = [(table, weights, measure(benchmark, table, weights)) for table, weights in trials]

    def agrees(name: str, column: str, part: np.ndarray) -> bool:
        return all(
            np.isclose(np.average(table[column][part > 0], weights=weights[part > 0]), scores[name], rtol=1e-9)
            for table, weights, scores in measured
        )

    found = {}
    for name in names:
        likely = [parts[name]] if name in parts else parts.values()
        options = ((column, part) for column in ("score", "text_score") for part in likely)
        found[name] = next((option for option in options if agrees(name, *option)), None)
        if found[name] is None:
            return None
    return found


BINS = 10


@dataclass(frozen=True)
class Bin:
    """Questions whose probability lies in [low, high); the last bin includes its end."""

    low: float
    high: float
    items: int
    mean: float
    """Mean probability; NaN in an empty bin."""
    share: float
    """Share of questions whose right answer is the first choice; NaN in an empty bin."""


@dataclass(frozen=True)
class Calibration:
    """Reliability of a set of probabilities."""

    bins: list[Bin]
    ece: float
    brier: float
    items: int


def calibrate(probabilities: Sequence[float], outcomes: Sequence[bool], bins: int = BINS) -> Calibration:
    """Reliability of probabilities (n,) of an outcome (n,).

    Raises:
        ValueError: there are none, the two differ in length, or a probability is none.
    """
    p, y = np.asarray(probabilities, dtype=float), np.asarray(outcomes, dtype=float)
    if not len(p) or p.shape != y.shape:
        raise ValueError(f"{len(p)} probabilities and {len(y)} outcomes: calibration needs one of each per question")
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("a probability is not between 0 and 1")
    index = np.minimum((p * bins).astype(int), bins - 1)
    items = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean, share = (np.bincount(index, weights=values, minlength=bins) / items for values in (p, y))
    gaps = np.abs(mean - share)[items > 0]
    ece = float((gaps * items[items > 0]).sum() / len(p))
    found = [Bin(i / bins, (i + 1) / bins, int(items[i]), float(mean[i]), float(share[i])) for i in range(bins)]
    return Calibration(found, ece, float(((p - y) ** 2).mean()), len(p))


def calibration_of(rows: Sequence[Answered]) -> Calibration | None:
    """Calibration of an evaluation's p_yes, or None where the protocol asks for none."""
    asked = [row for row in rows if row.p_yes is not None]
    if not asked:
        return None
    return calibrate([row.p_yes for row in asked], [first_choice_is_right(row) for row in asked])


def first_choice_is_right(row: Answered) -> bool:
    """Whether Yes (True) is the reference answer of a row with p_yes."""
    if "positive" in row.details:
        return bool(row.details["positive"])
    return row.answer.strip().lower() in ("yes", "true")
