"""Asking a model every test question on Ray workers, with the right picture and with another one (blind).

Answers are written per batch, so a killed evaluation goes on where it stopped; a score is made only when every question
was answered once. Greedy answers to questions asked alone do not depend on batches or workers.
"""

import json
import random
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import ray
import ray.data

from pipelines.execution import ensure_ray, quiet_ray_data
from pipelines.sources import open_source
from workflows.config import Recipe
from workflows.errors import WorkflowError
from workflows.evaluate.answer import Answerer, Asked
from workflows.evaluate.questions import Picture, load_questions, majority_answer
from workflows.evaluate.score import MARGIN, OVERALL, accuracy_by_type
from workflows.layout import write_atomic

OnProgress = Callable[[int, int], None]


def evaluate(recipe: Recipe, model: Path, out: Path, on_progress: OnProgress = lambda done, total: None) -> dict:
    """Score a model on the recipe's test sources.

    Args:
        model: model folder.
        out: folder for answers and scores.json; a finished one is read, not repeated.

    Returns:
        {"scores", "blind", "majority": {type: accuracy}, "majority_answer", "questions": counts by type}.

    Raises:
        WorkflowError: the recipe has no test sources, or questions were left unanswered.
    """
    if (out / "scores.json").exists():
        return json.loads((out / "scores.json").read_text())
    if not recipe.data.test:
        raise WorkflowError(f"recipe {recipe.name} has no data.test sources to evaluate on")
    pictures = load_questions(recipe.data.test)
    answers, types = _flat(pictures, "answers"), _flat(pictures, "types")
    common = majority_answer(recipe.data.train)
    predictions = collect(recipe, model, out, pictures, on_progress)
    scores = accuracy_by_type(predictions["seeing"], answers, types)
    blind = accuracy_by_type(predictions["blind"], answers, types)
    scores[MARGIN] = scores[OVERALL] - blind[OVERALL]
    result = {
        "scores": scores,
        "blind": blind,
        "majority": accuracy_by_type([common] * len(answers), answers, types),
        "majority_answer": common,
        "questions": {OVERALL: len(answers), **Counter(types)},
    }
    rows = zip(_flat(pictures, "ids"), _flat(pictures, "questions"), answers, types, predictions["seeing"], strict=True)
    lines = (
        json.dumps(dict(zip(("id", "question", "answer", "type", "prediction"), row, strict=True))) for row in rows
    )
    write_atomic(out / "answers.jsonl", "\n".join(lines) + "\n")
    write_atomic(out / "scores.json", json.dumps(result, indent=2))
    return result


def collect(recipe: Recipe, model: Path, out: Path, pictures: list[Picture], on_progress: OnProgress) -> dict:
    """Answers in question order under "seeing" and "blind"."""
    size = recipe.evaluate.batch_pictures
    shown = {"seeing": list(range(len(pictures))), "blind": derangement(len(pictures), recipe.seed)}
    common, tasks = {"recipe": recipe.model_dump_json(), "model": str(model)}, []
    for mode, order in shown.items():
        for first in range(0, len(pictures), size):
            chosen = range(first, min(first + size, len(pictures)))
            items = [(pictures[order[i]].source, pictures[order[i]].location, pictures[i].questions) for i in chosen]
            file = str(out / "parts" / f"{mode}-{first:07d}.json")
            tasks.append({**common, "file": file, "items": json.dumps(items)})
    todo = [task for task in tasks if not Path(task["file"]).exists()]
    done = len(tasks) - len(todo)
    on_progress(done, len(tasks))
    if todo:
        ensure_ray()
        with quiet_ray_data():
            dataset = ray.data.from_items(todo, override_num_blocks=len(todo))
            finished = dataset.map(
                _answer_part, num_cpus=recipe.evaluate.cpus_per_worker, concurrency=recipe.evaluate.workers
            )
            for _ in finished.iter_rows():
                done += 1
                on_progress(done, len(tasks))
    predictions = {mode: [] for mode in shown}
    for task in tasks:
        mode = Path(task["file"]).name.split("-")[0]
        predictions[mode] += json.loads(Path(task["file"]).read_text())
    expected = sum(len(picture.questions) for picture in pictures)
    for mode, got in predictions.items():
        if len(got) != expected:
            raise WorkflowError(f"{mode}: {len(got)} of {expected} questions were answered; delete {out} and run again")
    return predictions


def _answer_part(task: dict) -> dict:
    """Ray Data task: answers one batch and writes it, whole or not at all."""
    sources, answerer = _open_worker(task["recipe"], task["model"])
    asked = [
        Asked(None if location is None else sources[source].read_image(location), questions)
        for source, location, questions in json.loads(task["items"])
    ]
    answers = answerer.answer(asked)
    write_atomic(Path(task["file"]), json.dumps([answer for group in answers for answer in group]))
    return {"file": task["file"]}


@lru_cache(maxsize=1)
def _open_worker(recipe_json: str, model: str) -> tuple[list, Answerer]:
    """Sources and model of this worker process, loaded by its first task."""
    recipe = Recipe.model_validate_json(recipe_json)
    answerer = Answerer(model, recipe.evaluate.max_new_tokens, threads=recipe.evaluate.cpus_per_worker)
    return [open_source(config) for config in recipe.data.test], answerer


def derangement(count: int, seed: int) -> list[int]:
    """A permutation that leaves nothing in place, so that every blind question gets another picture."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    place = {value: i for i, value in enumerate(order)}
    return [order[(place[i] + 1) % count] for i in range(count)]


def _flat(pictures: list[Picture], field: str) -> list[str]:
    return [value for picture in pictures for value in getattr(picture, field)]
