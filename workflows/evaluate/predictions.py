"""Scoring answers that were made elsewhere, in the forms in which the benchmarks' own scripts take them."""

import json
from collections import Counter
from pathlib import Path

from workflows.errors import UsageError, WorkflowError
from workflows.evaluate.benchmarks.base import Benchmark, ids_text
from workflows.evaluate.results import Incomplete, row_of, write_result

_IDS = ("id", "question_id", "questionId", "image")
_ANSWERS = ("answer", "prediction", "text", "pred_answer")


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
