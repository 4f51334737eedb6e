"""The folder that an evaluation leaves, and how to read it: answers.jsonl, one line per item, and scores.json.

scores.json holds

    benchmark, model        names
    scores, blind, majority flat dicts of floats by the same names; "overall" is always there, a type of question has
                            its own name, and so has what else the protocol asks for ("f1", "text/f1", "yes_rate", ...)
    majority_answer         the constant answer behind `majority`
    questions               counts: "overall" and each type
    complete                False when the scores are of a part of the items only (asked for with --allow-partial)
    missing                 {"count", "ids": the first, "reasons": counts}; count 0 when complete
    notes                   lines for a person: empty answers, answers that were cut off, another set than the published
    pictures                where the pictures are, see `read_picture`

Scores of any weighting of the items come from `measure`, so an interval needs no knowledge of the benchmark.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from workflows.evaluate.picture_store import open_store
from workflows.layout import write_atomic

ANSWERS = "answers.jsonl"
SCORES = "scores.json"


@dataclass(frozen=True)
class Answered:
    """One item with the model's answers, to its own picture and to another one (blind)."""

    id: str
    """Unique in the evaluation. Where a benchmark asks a question twice, it begins with the variant ("ocr/123")."""
    question: str
    """The bare question, without the protocol's instructions."""
    answer: str
    """The reference answer to show; for ten human answers the most frequent."""
    answers: list[str]
    """All reference answers."""
    type: str
    """Type of question, or the benchmark's split or variant: scores of this name are over these items."""
    prediction: str
    """What the model generated."""
    score: float
    """Between 0 and 1, by the protocol. For Yes/No benchmarks by the first token's probability."""
    image: str | None = None
    """Location of the picture, for `read_picture`. Items with the same (source, image) share a picture."""
    source: int = 0
    """Which entry of `pictures` in scores.json the location belongs to."""
    prompt: str = ""
    """What the model was asked, instructions included."""
    text_score: float | None = None
    """A second score of the generated text: where `score` is by the first token's probability, what was generated; of
    vqav2, what its published script makes of the answer."""
    text_yes: float | None = None
    """Of Yes/No benchmarks: whether the generated text says the first choice (1) or the second (0); None for neither.
    Of vizwiz: whether it says unanswerable."""
    p_yes: float | None = None
    """Probability of the first choice (Yes, True) against the second as first token, where the protocol asks for it."""
    blind_image: str | None = None
    """Location of the other picture, in the entry `blind_source` of `pictures`."""
    blind_source: int = 0
    blind_prediction: str | None = None
    blind_score: float | None = None
    blind_text_score: float | None = None
    blind_text_yes: float | None = None
    blind_p_yes: float | None = None
    majority_score: float | None = None
    """Score of the majority answer on this item."""
    prompt_tokens: int = 0
    """Length of the prompt, picture included."""
    answer_tokens: int = 0
    """Generated tokens, the end token included."""
    seconds: float = 0.0
    """The item's share of its batch's time."""
    cut: bool = False
    """The answer was still going on at the longest length."""
    details: dict = field(default_factory=dict)
    """What else the benchmark's own scores need: numbers by name, the same in every row ("answerable", "positive")."""


def write_answers(folder: Path, rows: Iterable[Answered]) -> None:
    """Write answers.jsonl, whole or not at all."""
    write_atomic(folder / ANSWERS, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def read_answers(folder: Path) -> list[Answered]:
    """The rows of answers.jsonl. Raises FileNotFoundError."""
    with open(folder / ANSWERS, encoding="utf-8") as file:
        return [Answered(**json.loads(line)) for line in file]


def read_scores(folder: Path) -> dict:
    """The content of scores.json. Raises FileNotFoundError: the evaluation is not finished."""
    return json.loads((folder / SCORES).read_text())


def write_scores(folder: Path, result: dict) -> None:
    """Write scores.json, whole or not at all: the mark of a finished evaluation."""
    write_atomic(folder / SCORES, json.dumps(result, indent=2))


def read_picture(scores: dict, row: Answered, blind: bool = False) -> bytes | None:
    """The encoded picture of a row, or the other one that it was shown blind; None for an item without.

    Raises:
        OSError, ValueError: it cannot be read any more.
    """
    source, location = (row.blind_source, row.blind_image) if blind else (row.source, row.image)
    return None if location is None else open_store(scores["pictures"][source]).read(location)


def columns(rows: Sequence[Answered], blind: bool = False) -> dict[str, np.ndarray]:
    """What `measure` needs of n rows: arrays (n,) "score", "text_score", "text_yes", "p_yes", "type" and
    those of `details`.

    Args:
        blind: take the answers to the other pictures. What is None is NaN.
    """
    names = ("score", "text_score", "text_yes", "p_yes")
    table = {
        name: np.array([getattr(row, f"blind_{name}" if blind else name) for row in rows], dtype=float)
        for name in names
    }
    table["type"] = np.array([row.type for row in rows])
    for name in rows[0].details if rows else ():
        table[name] = np.array([row.details[name] for row in rows], dtype=float)
    return table


def measure(benchmark: str, table: dict[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, float]:
    """The flat scores of some items.

    Args:
        benchmark: its name, as in scores.json.
        table: from `columns`.
        weights: (n,) how often each row counts; once each by default. A bootstrap sample is a vector of counts.

    Returns:
        Scores by name; a score that the weighting leaves undefined (a type without items) is NaN.
    """
    from workflows.evaluate.benchmarks import benchmark_class

    count = len(table["score"])
    return benchmark_class(benchmark).measure(table, np.ones(count) if weights is None else weights)
