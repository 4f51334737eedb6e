"""The report's tables as plain rows, and the counts behind its figures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workflows.evaluate.intervals import Intervals
from workflows.evaluate.plots import Bar
from workflows.evaluate.results import Answered
from workflows.evaluate.score import MARGIN, OVERALL, normalise
from workflows.evaluate.statistics import Interval

OTHER = "(other)"
_MOST_BARS, _MOST_ANSWERS = 25, 10
FEW_PICTURES = 30


@dataclass(frozen=True)
class ScoreRow:
    """One line of the table of scores. `items` is None for what is no type of question."""

    name: str
    items: int | None
    interval: Interval
    blind: float | None
    margin: Interval | None
    majority: float | None


def score_rows(scores: dict, intervals: Intervals) -> tuple[list[ScoreRow], list[ScoreRow], list[ScoreRow]]:
    """Lines of the tables: overall and the types, the protocol's other scores, and these by type (f1/popular)."""
    kinds, others, others_by_kind = [], [], []
    for name, value in scores["scores"].items():
        if name == MARGIN:
            continue
        row = ScoreRow(
            name,
            scores["questions"].get(name),
            intervals.scores.get(name, Interval(value, float("nan"), float("nan"), 0)),
            scores.get("blind", {}).get(name),
            intervals.margins.get(name),
            scores.get("majority", {}).get(name),
        )
        of_kind = any(name.endswith(f"/{kind}") for kind in scores["questions"] if kind != OVERALL)
        (kinds if row.items is not None else others_by_kind if of_kind else others).append(row)
    first = [row for row in kinds if row.name == OVERALL]
    rest = sorted((row for row in kinds if row.name != OVERALL), key=lambda row: -row.items)
    return first + rest, others, others_by_kind


def bars(rows: Sequence[ScoreRow]) -> list[Bar]:
    """The lines of the figure: as the table's, at most `_MOST_BARS`."""
    return [Bar(row.name, row.interval, row.blind, row.majority) for row in rows[:_MOST_BARS]]


def confusion(rows: Sequence[Answered]) -> tuple[np.ndarray, list[str], list[str]] | None:
    """Counts (references, answers) of the most frequent references; what else was said is under `OTHER`.

    None where the references hardly repeat, as in captions: a table of single answers says nothing.
    """
    pairs = [(normalise(row.answer), normalise(row.prediction)) for row in rows]
    frequent = [
        answer for answer, times in Counter(right for right, _ in pairs).most_common(_MOST_ANSWERS) if times > 1
    ]
    if len(frequent) < 2:
        return None
    place = {answer: i for i, answer in enumerate(frequent)}
    counts = np.zeros((len(frequent), len(frequent) + 1), dtype=int)
    for right, said in pairs:
        if right in place:
            counts[place[right], place.get(said, len(frequent))] += 1
    columns = [*frequent, OTHER]
    return (counts, frequent, columns) if counts[:, -1].any() else (counts[:, :-1], frequent, frequent)


def answer_facts(rows: Sequence[Answered]) -> dict[str, str]:
    """What is odd about the answers, and how long they are and took, in words."""
    seconds = np.array([row.seconds for row in rows])
    tokens = np.array([row.answer_tokens for row in rows])
    facts = {
        "empty answers": f"{sum(not row.prediction.strip() for row in rows):,}",
        "answers cut off at the longest length": f"{sum(row.cut for row in rows):,}",
        "tokens of an answer": f"{np.median(tokens):,.0f} in the median, {tokens.max():,} at most",
    }
    if seconds.any():
        p50, p95 = np.quantile(seconds, [0.5, 0.95])
        facts["time for one question"] = f"{_time(p50)} in the median, {_time(p95)} at the 95th percentile"
    return facts


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
