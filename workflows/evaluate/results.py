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

Scores of any weighting of the items come from `measure`, so an interval needs no knowledge of the benchmark.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from pipelines import storage
from pipelines.storage import write_atomic
from workflows.errors import WorkflowError
from workflows.evaluate.benchmarks.base import Benchmark, Item, ids_text
from workflows.evaluate.collect import BLIND, SEEING
from workflows.evaluate.questions import open_store

ANSWERS = "answers.jsonl"
SCORES = "scores.json"


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


_LISTED = 20  # ids in scores.json
_REASONS = 3  # in an error


class Incomplete(WorkflowError):
    """Items are missing, so there is no score. `missing` is why, by id."""

    def __init__(self, benchmark: Benchmark, missing: dict[str, str], what: str, advice: str):
        counts = Counter(missing.values()).most_common()
        reasons = [f"{reason} ({count:,})" if count > 1 else reason for reason, count in counts[:_REASONS]]
        more = f"; and {len(counts) - _REASONS} other reasons" if len(counts) > _REASONS else ""
        super().__init__(
            f"{benchmark.name}: no score, {ids_text(missing, f'of {len(benchmark.items):,} items')} {what}: "
            f"{'; '.join(reasons)}{more}. {advice}, or pass --allow-partial for a score of the rest"
        )
        self.missing = missing


def missing_items(benchmark: Benchmark, replies: dict[str, dict[str, dict]], blind: Iterable[str]) -> dict[str, str]:
    """Why items have no score, by id: what cannot be asked, and what has no answer in one of the modes."""
    missing = dict(benchmark.missing)
    wanted = {SEEING: {item.id for item in benchmark.items}, BLIND: set(blind)}
    for mode, ids in wanted.items():
        for item in benchmark.items:
            if item.id in ids and item.id not in missing and "text" not in (found := replies[mode].get(item.id, {})):
                missing[item.id] = found.get("error", "no answer")
    unknown = [key for found in replies.values() for key in found if key not in wanted[SEEING]]
    if unknown:
        raise WorkflowError(f"{benchmark.name}: there are answers to unknown {ids_text(unknown, 'items')}")
    return missing


def row_of(
    benchmark: Benchmark, item: Item, seeing: dict, blind: dict | None = None, shown: tuple[int, str] | None = None
) -> Answered:
    """The row of an item.

    Args:
        seeing: the reply, a dict with the fields of answer.Reply of which only `text` is needed.
        blind: the reply to the other image; None where there is none. Of text alone it is the same reply.
        shown: source and location of the other image.
    """
    scored = benchmark.score(item, seeing["text"], seeing.get("p_first"))
    row = Answered(
        item.id,
        item.question,
        item.answer,
        item.answers,
        item.type,
        seeing["text"],
        scored.score,
        image=item.image,
        source=item.source,
        prompt=item.prompt,
        text_score=scored.text_score,
        text_yes=scored.text_yes,
        p_yes=seeing.get("p_first"),
        details=item.details,
        **{name: seeing[name] for name in ("prompt_tokens", "answer_tokens", "seconds", "cut") if name in seeing},
    )
    if item.image is None:
        blind = seeing
    if blind is None:
        return row
    source, location = shown or (0, None)
    other = {f"blind_{k}": v for k, v in asdict(benchmark.score(item, blind["text"], blind.get("p_first"))).items()}
    return replace(
        row,
        blind_image=location,
        blind_source=source,
        blind_prediction=blind["text"],
        blind_p_yes=blind.get("p_first"),
        **other,
    )


def write_result(benchmark: Benchmark, rows: list[Answered], missing: dict[str, str], out: Path, label: str) -> dict:
    """Score rows of the benchmark's items and write the folder.

    Args:
        rows: in the order of the items.
        missing: why the other items have none.
        label: what a person calls the model.

    Returns:
        The content of scores.json.

    Raises:
        Incomplete: there is not one row.
    """
    if not rows:
        raise Incomplete(benchmark, missing, "have no answer", "Mend the files")
    items = {item.id: item for item in benchmark.items}
    common = benchmark.majority()
    rows, constant = _with_majority(benchmark, rows, items, common)
    tables = {"scores": columns(rows), "majority": columns(constant)}
    notes = [*benchmark.notes, *_remarks(rows)]
    if all(row.blind_score is not None for row in rows) and any(row.image is not None for row in rows):
        tables["blind"] = columns(rows, blind=True)
    else:
        notes.append("no blind score: there are no answers to other images")
    found = {name: _finite(measure(benchmark.name, table)) for name, table in tables.items()}
    if "blind" in found:
        found["scores"][MARGIN] = found["scores"][OVERALL] - found["blind"][OVERALL]
    result = {
        "benchmark": benchmark.name,
        "model": label,
        "scores": found["scores"],
        "blind": found.get("blind", {}),
        "majority": found["majority"],
        "majority_answer": common,
        "questions": {OVERALL: len(rows), **Counter(row.type for row in rows)},
        "complete": not missing,
        "missing": {"count": len(missing), "ids": list(missing)[:_LISTED], "reasons": dict(Counter(missing.values()))},
        "notes": notes,
        "images": [_public(store) for store in benchmark.stores],
        "data_digest": benchmark.digest,
    }
    write_answers(out, rows)
    write_scores(out, result)
    return result


def _with_majority(
    benchmark: Benchmark, rows: list[Answered], items: dict[str, Item], common: str
) -> tuple[list[Answered], list[Answered]]:
    """The rows with the majority answer's scores beside theirs, and the rows that it would make."""
    chance = None if benchmark.choices is None else float(common == benchmark.choices[0])
    scored = [benchmark.score(items[row.id], common, chance) for row in rows]
    constant = [
        replace(row, prediction=common, p_yes=chance, **asdict(score)) for row, score in zip(rows, scored, strict=True)
    ]
    return [replace(row, majority_score=one.score) for row, one in zip(rows, scored, strict=True)], constant


def _remarks(rows: list[Answered]) -> list[str]:
    """Lines about answers that are empty or were cut off."""
    remarks = []
    for what, ids in (
        ("answers are empty", [row.id for row in rows if not row.prediction]),
        ("answers were cut off at the longest length", [row.id for row in rows if row.cut]),
    ):
        if ids:
            remarks.append(ids_text(ids, what))
    return remarks


def _finite(scores: dict[str, float]) -> dict[str, float]:
    """Without the scores that these items leave undefined: JSON has no NaN."""
    return {name: value for name, value in scores.items() if np.isfinite(value)}


def _public(value):
    """An image store's description without the passwords that a URI may hold: scores.json is logged."""
    if isinstance(value, dict):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return storage.shown(value) if isinstance(value, str) and "://" in value else value


OVERALL = "overall"
MARGIN = "margin_over_blind"
_WIDE, _SHOWN = 14, 5


def table(result: dict) -> str:
    """The content of scores.json as text: by type with the baselines beside, then the protocol's other scores.

    Of those, the ones of a single type are left to scores.json.
    """
    kinds = [kind for kind in result["questions"] if kind in result["scores"]]
    measured = [name for name in result["scores"] if name in result["majority"]]
    others = [name for name in measured if not any(name == kind or name.endswith(f"/{kind}") for kind in kinds[1:])][1:]
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
