"""Two models on the same items: scores beside each other, and the interval of their difference.

Both models' answers to an image are drawn together. Most of what makes an image hard is common to both, so the paired
interval is much narrower than one made of the two models' own intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlmamba.conversation import clean
from workflows.errors import UsageError
from workflows.evaluate.intervals import DIFFERENCE, Draws
from workflows.evaluate.results import Answered, columns, measure, read_answers, read_scores
from workflows.evaluate.statistics import LEVEL, SEED, Interval, bootstrap

_NAMED = 5  # ids in an error


@dataclass(frozen=True)
class Difference:
    """One score of two models on the same items; `interval` is that of second - first."""

    first: float
    second: float
    interval: Interval

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval.low > 0 or self.interval.high < 0


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items, item by item."""

    benchmark: str
    first: str
    second: str
    items: int
    better: int
    """Items that the second model scores higher on."""
    worse: int
    scores: dict[str, Difference]

    def as_dict(self) -> dict:
        """Plain data, with the differences under flat names: "overall", "overall/low", "overall/high"; none is NaN."""
        flat = {}
        for name, score in self.scores.items():
            ends = {"": score.interval.value, "/low": score.interval.low, "/high": score.interval.high}
            flat |= {f"{name}{end}": value for end, value in ends.items() if np.isfinite(value)}
        named = {"benchmark": self.benchmark, "first": self.first, "second": self.second, "items": self.items}
        both = {n: {"first": s.first, "second": s.second} for n, s in self.scores.items() if n in flat}
        return {**named, "better": self.better, "worse": self.worse, "scores": both, "difference": flat}

    def text(self) -> str:
        """A table for a person."""
        width = max(len("score"), *map(len, self.scores))
        lines = [
            f"first   {self.first}",
            f"second  {self.second}",
            f"{self.items:,} items of {self.benchmark}: the second model is better on {self.better:,}, worse on "
            f"{self.worse:,}",
            "",
            f"{'score':<{width}}{'first':>9}{'second':>9}{'difference':>12}   {LEVEL:.0%} interval (paired)",
        ]
        for name, score in self.scores.items():
            ends = f"{100 * score.interval.low:+7.1f} to {100 * score.interval.high:+.1f}"
            verdict = "" if score.clear else "  not told apart"
            lines.append(
                f"{name:<{width}}{score.first:>9.1%}{score.second:>9.1%}{100 * score.interval.value:>+12.1f}   "
                f"{ends}{verdict}"
            )
        return "\n".join(lines)


def compare_folders(first: Path, second: Path) -> Comparison:
    """Compare two finished evaluations; see `compare`. Raises UsageError when one is not finished."""
    for folder in (first, second):
        if not (folder / "scores.json").is_file():
            raise UsageError(f"{folder} holds no finished evaluation (no scores.json)")
    return compare(read_scores(first), read_answers(first), read_scores(second), read_answers(second))


def compare(
    first_scores: dict,
    first: Sequence[Answered],
    second_scores: dict,
    second: Sequence[Answered],
    resamples: int | None = None,
    seed: int = SEED,
) -> Comparison:
    """Paired intervals of the second model's scores minus the first's: both see the same draws of the same images.

    Raises:
        UsageError: the two are not of the same benchmark and the same items, each once.
    """
    benchmark = first_scores["benchmark"]
    check_same_benchmark(benchmark, second_scores["benchmark"])
    second = _same_items(first, second)
    tables = [columns(first), columns(second)]
    drawn = Draws(benchmark, tables, first)

    def difference(counts: np.ndarray) -> np.ndarray:
        one, two = np.split(drawn.statistic(counts), 2, axis=1)
        return two - one

    found = bootstrap(
        difference,
        drawn.images,
        counted=drawn.counted,
        bounds=[DIFFERENCE] * len(drawn.names),
        resamples=resamples or drawn.resamples,
        seed=seed,
    )
    one, two = (measure(benchmark, table) for table in tables)
    scores = {
        name: Difference(one[name], two[name], interval) for name, interval in zip(drawn.names, found, strict=True)
    }
    changes = tables[1]["score"] - tables[0]["score"]
    labels = (str(first_scores.get("model", "first")), str(second_scores.get("model", "second")))
    return Comparison(benchmark, *labels, len(first), int((changes > 0).sum()), int((changes < 0).sum()), scores)


def check_same_benchmark(first: str, second: str) -> None:
    """Raise UsageError where two names of benchmarks differ."""
    if first != second:
        raise UsageError(f"{first} cannot be compared with {second}: give the same benchmark")


def _same_items(first: Sequence[Answered], second: Sequence[Answered]) -> list[Answered]:
    """The second evaluation's rows in the order of the first's. Raises UsageError where the items differ."""
    own, other = {row.id: row for row in first}, {row.id: row for row in second}
    if len(own) < len(first) or len(other) < len(second):
        raise UsageError("an evaluation holds an item twice; it cannot be compared")
    problems = []
    for side, ids in (("first", own.keys() - other.keys()), ("second", other.keys() - own.keys())):
        if ids:
            problems.append(f"{len(ids):,} items are in the {side} only ({_some(ids)})")
    changed = [key for key in own.keys() & other.keys() if _asked(own[key]) != _asked(other[key])]
    if changed:
        problems.append(f"{len(changed):,} items ask something else or have other references ({_some(changed)})")
    if problems:
        raise UsageError("only answers to the same items can be compared: " + "; ".join(problems))
    return [other[row.id] for row in first]


def _asked(row: Answered) -> tuple:
    return clean(row.question), row.type, sorted(row.answers), row.image  # older results hold `<image>` in it


def _some(ids) -> str:
    names = sorted(ids)[:_NAMED]
    return ", ".join(names) + (", ..." if len(ids) > _NAMED else "")
