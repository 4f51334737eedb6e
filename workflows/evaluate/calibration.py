"""How far a model's Yes/No probabilities can be taken at their word: reliability by bins, ECE and Brier score.

The probability is that of the first choice (Yes, True) against the second as first token. Among the questions where it
is near 0.8, eight of ten should have the answer Yes. The expected calibration error (ECE) is the mean distance from
that over equal bins of probability, weighted by questions (Naeini et al. 2015, for a binary outcome); the Brier score
is the mean squared error of the probability, 0.25 for one that always says one half.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workflows.evaluate.results import Answered

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
