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
    images                where the images are, see `read_image`

Names of scores are flat, and MLflow has the blind and the majority's under "blind/..." and "majority/...". A gate uses
them. So a type that is called "overall", or "x/low" beside a type x, must not take the place of what a gate means: it
is scored as "type/overall" (`type_name`).

Scores of any weighting of the items come from `measure`, so an interval needs no knowledge of the benchmark.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pipelines.storage import write_atomic
from workflows.evaluate.questions import open_store

ANSWERS = "answers.jsonl"
SCORES = "scores.json"
MARGIN = "margin_over_blind"
OVERALL = "overall"
_FIRST = ("", OVERALL, MARGIN, "blind", "majority", "partial", "type")
_LAST = ("", "low", "high")
_ENDING = "score"
_WIDE, _SHOWN = 14, 5  # columns and ids of the table


@dataclass(frozen=True)
class Answered:
    """One item with the model's answers, to its own image and to another one (blind)."""

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
    """Location of the image, for `read_image`. Items with the same (source, image) share an image."""
    source: int = 0
    """Which entry of `images` in scores.json the location belongs to."""
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
    """Location of the other image, in the entry `blind_source` of `images`."""
    blind_source: int = 0
    blind_prediction: str | None = None
    blind_score: float | None = None
    blind_text_score: float | None = None
    blind_text_yes: float | None = None
    blind_p_yes: float | None = None
    majority_score: float | None = None
    """Score of the majority answer on this item."""
    prompt_tokens: int = 0
    """Length of the prompt, image included."""
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


def read_image(scores: dict, row: Answered, blind: bool = False) -> bytes | None:
    """The encoded image of a row, or the other one that it was shown blind; None for an item without.

    Raises:
        OSError, ValueError: it cannot be read any more.
    """
    source, location = (row.blind_source, row.blind_image) if blind else (row.source, row.image)
    return None if location is None else open_store(scores.get("images", scores.get("pictures"))[source]).read(location)


def columns(rows: Sequence[Answered], blind: bool = False) -> dict[str, np.ndarray]:
    """What `measure` needs of n rows: arrays (n,) "score", "text_score", "text_yes", "p_yes", "type" and
    those of `details`.

    Args:
        blind: take the answers to the other images. What is None is NaN.
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


def table(result: dict) -> str:
    """The content of scores.json as text: by type with the baselines beside, then the protocol's other scores.

    Of those, the ones of a single type are left to scores.json. Where all questions are of one type, it is "overall".
    """
    kinds = [kind for kind in result["questions"] if kind in result["scores"]]
    measured = [name for name in result["scores"] if name in result["majority"]]
    others = [name for name in measured if not any(name == kind or name.endswith(f"/{kind}") for kind in kinds[1:])][1:]
    counts = result["questions"]
    kinds = kinds[:1] + [kind for kind in kinds[1:] if counts[kind] < counts[OVERALL]]
    width = max(_WIDE, *(len(name) + 2 for name in [*kinds, *others]))
    majority = f"majority ({result['majority_answer']})"
    column = len(majority) + 2
    lines = [f"{'':<{width}}{'questions':>10}{'score':>10}{'blind':>8}{majority:>{column}}"]
    for name in [*kinds, *others]:
        count = f"{result['questions'][name]:,}" if name in kinds else ""
        values = (result[part].get(name) for part in ("scores", "blind", "majority"))
        score, blind, constant = ("" if value is None else f"{value:.1%}" for value in values)
        lines.append(f"{name:<{width}}{count:>10}{score:>10}{blind:>8}{constant:>{column}}".rstrip())
    lines.append("blind: the same model, another image")
    lines += result.get("notes", [])
    if not result.get("complete", True):
        missing = result["missing"]
        shown = ", ".join(missing["ids"][:_SHOWN]) + (", ..." if missing["count"] > _SHOWN else "")
        lines.append(f"PARTIAL: {missing['count']:,} items are missing ({shown}); this is not the benchmark's score")
    return "\n".join(lines)


def type_name(kind: str, taken: Iterable[str] = ()) -> str:
    """The name that a type of question is scored under: its own, or "type/KIND" where that could be a name of ours.

    Two types never have the same one: what begins with "type/" already gets another, and "/score" is set behind
    what would end as an interval does ("type/x/low/score").

    Args:
        taken: first parts of names that the benchmark gives scores of its own ("script").
    """
    first, last = kind.split("/")[0], kind.split("/")[-1]
    ends = "/" in kind and last in _LAST
    if first not in _FIRST and first not in taken and not ends:
        return kind
    return f"type/{kind}/{_ENDING}" if ends or (last == _ENDING and "/" in kind) else f"type/{kind}"
