"""The workflow's step: the test sources, then the recipe's benchmarks, each finished, logged and skipped when done."""

from pathlib import Path

from workflows.config import Recipe
from workflows.console import Console
from workflows.evaluate.benchmarks import open_benchmark
from workflows.evaluate.benchmarks.base import Benchmark
from workflows.evaluate.benchmarks.recipe import TestSources
from workflows.evaluate.place import evaluation_folder
from workflows.evaluate.publish import REPORT, finish, flat_scores, log_evaluation
from workflows.evaluate.results import SCORES, read_answers
from workflows.evaluate.runner import evaluate_benchmark, workers_of
from workflows.evaluate.sheet import draw_sheet
from workflows.layout import write_atomic
from workflows.tracking import Tracker


def evaluate_recipe(recipe: Recipe, root: Path, model: Path, console: Console, tracker: Tracker) -> dict:
    """Score a trained model on `data.test` and on `evaluate.benchmarks`, and log it all to the run.

    Args:
        root: folder that the evaluations' folders lie in, and samples.png.

    Returns:
        scores.json of the test sources. Its `scores` hold also the ends of their intervals ("overall/low", ...) and the
        benchmarks' scores ("pope/overall", "pope/overall/low", ...), so that the gate can use any of them.

    Raises:
        Incomplete, UsageError, WorkflowError: as `open_benchmark` and `evaluate_benchmark`.
    """
    sets: list[Benchmark] = [TestSources(recipe)]
    sets += [open_benchmark(**asked.model_dump()) for asked in recipe.evaluate.benchmarks]
    folders = [evaluation_folder(root, one, model, recipe.seed) for one in sets]
    if all((out / SCORES).exists() for out in folders):
        console.note("done before, skipped")
    results = []
    for one, out in zip(sets, folders, strict=True):
        if len(sets) > 1:
            console.note(f"{one.title}: {len(one.items):,} items")
        evaluate_benchmark(
            one,
            model,
            out,
            workers_of(recipe),
            recipe.seed,
            label=recipe.name,
            on_progress=lambda done, total: console.progress(f"{done}/{total} batches", last=done == total),
        )
        results.append(finish(out, {"recipe": recipe.name, "data digest": one.digest, "MLflow run": tracker.run_id}))
        if not (out / "logged").exists():
            if one is sets[0]:
                _log_test(recipe, root, out, results[0], tracker)
            else:
                log_evaluation(tracker.client, tracker.run_id, one.title, out, results[-1])
            write_atomic(out / "logged", tracker.run_id)
    scores = results[0]["scores"] | results[0]["intervals"]
    for one, result in zip(sets[1:], results[1:], strict=True):
        own = result["scores"] | result["intervals"]
        scores |= {f"{one.title}/{name}": value for name, value in own.items()}
    return results[0] | {"scores": scores}


def _log_test(recipe: Recipe, root: Path, out: Path, result: dict, tracker: Tracker) -> None:
    sheet = root / "samples.png"
    draw_sheet(recipe, {row.id: row.prediction for row in read_answers(out)}, sheet)
    for file in (sheet, out / SCORES, *sorted((out / REPORT).glob("*.html")), *sorted((out / REPORT).glob("*.png"))):
        tracker.log_file(file)
    named = {
        name if name.startswith(("blind/", "majority/")) else f"test/{name}": value
        for name, value in flat_scores(result).items()
    }
    tracker.log_metrics(named, 0)
