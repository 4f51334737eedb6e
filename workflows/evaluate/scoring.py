"""From answers to scores: which items are missing, the row of each, and the folder that a finished evaluation leaves.

The answers are the model's own, or come from a file in the forms in which the benchmarks' own scripts take them.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from pipelines import storage
from workflows.errors import UsageError, WorkflowError
from workflows.evaluate.benchmarks.base import Benchmark, Item, ids_text
from workflows.evaluate.collect import BLIND, SEEING
from workflows.evaluate.results import (
    MARGIN,
    OVERALL,
    Answered,
    columns,
    measure,
    write_answers,
    write_scores,
)

_LISTED = 20  # ids in scores.json
_REASONS = 3  # in an error
_IDS = ("id", "question_id", "questionId", "image")
_ANSWERS = ("answer", "prediction", "text", "pred_answer")


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


def read_predictions(file: Path) -> dict[str, str]:
    """Answers by id, from a JSON list, an object or JSON lines of {id, answer} (or the benchmarks' names for these).

    Raises:
        UsageError: the file is not there or not of this form.
        WorkflowError: ids repeat.
    """
    try:
        text = file.read_text(encoding="utf-8")
        starts_list = text.lstrip()[:1] == "["
        entries = json.loads(text) if starts_list else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON or JSON lines: {error}") from error
    pairs = [_pair(file, number, entry) for number, entry in enumerate(entries)]
    twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if twice:
        raise WorkflowError(f"{file}: {ids_text(twice, 'ids')} come more than once; an item is answered once")
    return dict(pairs)


def score_predictions(
    benchmark: Benchmark, predictions: dict[str, str], out: Path, label: str, allow_partial: bool = False
) -> dict:
    """Score answers by the benchmark's protocol. Returns the content of scores.json, which has no blind scores.

    Args:
        predictions: answer by item id (see the benchmark's file for what an id is).
        out: folder for what results.py describes.
        label: what a person calls them.
        allow_partial: score what there is when items are missing.

    Raises:
        WorkflowError: an id is of no item.
        Incomplete: items have no answer.
    """
    known = {item.id for item in benchmark.items}
    unknown = [key for key in predictions if key not in known]
    if unknown:
        raise WorkflowError(f"{benchmark.name}: {ids_text(unknown, 'ids')} are of no item of the benchmark")
    missing = {item.id: "no answer" for item in benchmark.items if item.id not in predictions}
    if missing and not allow_partial:
        raise Incomplete(benchmark, missing, "were not answered", "Add them")
    rows = [
        row_of(benchmark, item, {"text": predictions[item.id].strip()})
        for item in benchmark.items
        if item.id in predictions
    ]
    return write_result(benchmark, rows, missing, out, label)


def _pair(file: Path, number: int, entry: object) -> tuple[str, str]:
    keys = [key for key in _IDS if isinstance(entry, dict) and isinstance(entry.get(key), str | int)]
    answers = [key for key in _ANSWERS if isinstance(entry, dict) and isinstance(entry.get(key), str)]
    if not keys or not answers:
        raise UsageError(f"{file}, entry {number}: expected an object with {_IDS[0]} and {_ANSWERS[0]}")
    return str(entry[keys[0]]), entry[answers[0]]
