"""From a benchmark and a model to the evaluation folder: look, ask, check that nothing is missing, score, write.

A score is made only when every item was answered once; otherwise the error says which are missing. Asked to
(`allow_partial`), it scores what there is, and the result says that it is partial. Greedy answers to questions asked
alone do not depend on batches, workers or order, and neither does the choice of the other images.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from mlmamba.answering import first_tokens
from mlmamba.processing import MLMambaProcessor
from pipelines.identity import digest
from pipelines.storage import write_atomic
from workflows.console import Console
from workflows.errors import WorkflowError
from workflows.evaluate.benchmarks import open_benchmark
from workflows.evaluate.benchmarks.base import Benchmark
from workflows.evaluate.benchmarks.own_data import TestSources
from workflows.evaluate.collect import BLIND, SEEING, Workers, bad_prompts, blind_images, collect
from workflows.evaluate.intervals import find_intervals
from workflows.evaluate.plots import draw_sheet
from workflows.evaluate.questions import save_example
from workflows.evaluate.report import write_report
from workflows.evaluate.results import SCORES, read_answers, read_image, read_scores, write_scores
from workflows.evaluate.scoring import Incomplete, missing_items, row_of, write_result
from workflows.recipe.schema import Recipe
from workflows.registry.history import read_tag
from workflows.registry.register import Example
from workflows.runtime import connect_ray
from workflows.tracking.tracker import Tracker, metric_names
from workflows.train.trainer import Crew

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluated:
    """What a recipe's evaluation leaves for the steps after it, so that none lists records or reads weights again."""

    result: dict
    """scores.json of the test sources. Its `scores` hold also the ends of their intervals ("overall/low", ...) and the
    benchmarks' scores ("pope/overall", "pope/overall/low", ...), so that the gate can use any of them."""
    example: Example | None
    """An answered question, which serving asks a new version."""
    shown: dict[str, str]
    """An `image` file and a `question` for a person to try."""


def evaluate_recipe(
    recipe: Recipe, root: Path, model: Path, console: Console, tracker: Tracker, crew: Crew | None = None
) -> Evaluated:
    """Score a trained model on `data.test` and on `evaluate.benchmarks`, and log it all to the run.

    The test records are listed once, and the model's files are read once to name the evaluations.

    Args:
        root: folder that the evaluations' folders lie in, and samples.png.
        crew: training workers that are there already; they answer if they are as the recipe's evaluation wants them.

    Raises:
        Incomplete, UsageError, WorkflowError: as `open_benchmark` and `evaluate_benchmark`.
    """
    test = TestSources(recipe)
    sets: list[Benchmark] = [test, *(open_benchmark(**asked.model_dump()) for asked in recipe.evaluate.benchmarks)]
    weights = model_digest(model)
    how = workers_of(recipe)
    if crew is not None and not crew.suits(how.workers, how.cpus_per_worker, how.gpus_per_worker):
        crew.dismiss()
        crew = None
    folders = [evaluation_folder(root, one, weights, recipe.seed, computes_in=how.computes_in) for one in sets]
    if all((out / SCORES).exists() for out in folders):
        console.note("done before, skipped")
    results = []
    for one, out in zip(sets, folders, strict=True):
        if len(sets) > 1:
            console.note(f"{one.title}: {len(one.items):,} items")
        if not (out / SCORES).exists():
            connect_ray(say=console.note)
            console.note(f"asking {len(one.items):,} questions, when the workers have loaded the model ...")
        evaluate_benchmark(
            one,
            model,
            out,
            how,
            recipe.seed,
            label=recipe.name,
            on_progress=lambda done, total: console.progress(f"{done}/{total} batches", last=done == total),
            crew=crew,
        )
        results.append(
            finish(
                out,
                {
                    "recipe": recipe.name,
                    "data digest": one.digest,
                    "MLflow run": tracker.run_id,
                    "precision": how.computes_in,
                },
            )
        )
        if not (out / "logged").exists():
            if one is test:
                _log_test(recipe, test, root, out, results[0], tracker)
            else:
                log_evaluation(tracker.client, tracker.run_id, one.title, out, results[-1])
            write_atomic(out / "logged", tracker.run_id)
    scores = results[0]["scores"] | results[0]["intervals"]
    for one, result in zip(sets[1:], results[1:], strict=True):
        own = result["scores"] | result["intervals"]
        scores |= {f"{one.title}/{name}": value for name, value in own.items()}
    return Evaluated(
        results[0] | {"scores": scores},
        _choose_example(folders[0], recipe.evaluate.max_new_tokens),
        save_example(recipe, test.listed, root),
    )


def workers_of(recipe: Recipe) -> Workers:
    """How the recipe spreads questions."""
    return Workers(**{name: getattr(recipe.evaluate, name) for name in Workers.__dataclass_fields__})


def evaluate_benchmark(
    benchmark: Benchmark,
    model: Path,
    out: Path,
    how: Workers,
    seed: int = 7,
    max_new_tokens: int | None = None,
    allow_partial: bool = False,
    label: str | None = None,
    on_progress: OnProgress = lambda done, total: None,
    crew: Crew | None = None,
) -> dict:
    """Score a model on a benchmark, seeing and blind.

    Args:
        model: model folder.
        out: folder for what results.py describes; a finished one is read, not repeated. It must be of this model, these
            items, this seed and this length of answers alone (workflows/evaluate/run.py).
        how: workers and batches.
        seed: of the choice of the other images.
        max_new_tokens: longest answer; the protocol's by default.
        allow_partial: score what there is when items are missing.
        label: what a person calls the model.
        on_progress: called with batches done and in all.
        crew: as `collect` takes it.

    Returns:
        The content of scores.json.

    Raises:
        Incomplete: items cannot be asked (nothing is asked then), or were left unanswered; run again to go on.
        WorkflowError: an item was answered twice, a worker failed, or the tokenizer cannot tell the benchmark's two
            answers apart by their first token.
    """
    if (out / SCORES).exists() and (finished := read_scores(out)).get("complete", True):
        return finished
    processor = MLMambaProcessor.from_pretrained(model)
    if benchmark.choices is not None:
        _check_choices(processor, benchmark)
    cannot = benchmark.missing | bad_prompts(processor, benchmark.items)
    benchmark.missing = cannot
    if cannot and not allow_partial:
        raise Incomplete(benchmark, cannot, "cannot be asked", "Nothing was asked. Mend the files")
    others = blind_images([item for item in benchmark.items if item.id not in cannot], seed)
    longest = max_new_tokens or benchmark.max_new_tokens
    replies = collect(benchmark, model, out, how, longest, others, on_progress, crew)
    missing = missing_items(benchmark, replies, others)
    if missing and not allow_partial:
        raise Incomplete(benchmark, missing, "were not answered", "Run again to go on")
    rows = [
        row_of(benchmark, item, replies[SEEING][item.id], replies[BLIND].get(item.id), others.get(item.id))
        for item in benchmark.items
        if item.id not in missing
    ]
    result = write_result(benchmark, rows, missing, out, label or model.name)
    if not missing:
        shutil.rmtree(out / "parts", ignore_errors=True)
    return result


def _check_choices(processor: MLMambaProcessor, benchmark: Benchmark) -> None:
    try:
        first_tokens(processor.tokenizer, benchmark.choices)
    except ValueError as error:
        raise WorkflowError(f"{benchmark.name}: {error}") from error


def _log_test(recipe: Recipe, test: TestSources, root: Path, out: Path, result: dict, tracker: Tracker) -> None:
    sheet = root / "samples.png"
    write_atomic(sheet, draw_sheet(recipe, test.listed, {row.id: row.prediction for row in read_answers(out)}))
    for file in (sheet, out / SCORES, *sorted((out / REPORT).glob("*.html")), *sorted((out / REPORT).glob("*.png"))):
        tracker.log_file(file)
    named = {
        name if name.startswith(("blind/", "majority/")) else f"test/{name}": value
        for name, value in flat_scores(result).items()
    }
    tracker.log_metrics(named, 0)


_CHUNK = 1 << 20
_ENDINGS = (".json", ".safetensors", ".txt", ".model", ".jinja")


def model_digest(folder: Path) -> str:
    """Ten hex digits of a model folder's content: weights, configuration and tokenizer."""
    whole = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.name.endswith(_ENDINGS):
            one = hashlib.sha256()
            with open(file, "rb") as stream:
                while chunk := stream.read(_CHUNK):
                    one.update(chunk)
            whole.update(f"{file.relative_to(folder).as_posix()} {one.hexdigest()}\n".encode())
    return whole.hexdigest()[:10]


def evaluation_folder(
    root: Path,
    benchmark: Benchmark,
    model: str,
    seed: int,
    max_new_tokens: int | None = None,
    computes_in: str = "fp32",
) -> Path:
    """The folder of an evaluation below `root`. Workers and batches do not decide answers and are not in its name.

    Args:
        model: from `model_digest`.
        computes_in: as of `Workers`.
    """
    length = max_new_tokens or benchmark.max_new_tokens
    items = [[i.id, i.prompt, i.image, i.source, i.answers, i.type] for i in benchmark.items]
    precision = [] if computes_in == "fp32" else [computes_in]
    key = digest(model, benchmark.digest, items, length, seed, benchmark.choices, *precision)
    return root / f"{benchmark.title.replace('/', '-')}-{key}"


REPORT = "report"
_AT_ONCE = 500  # metrics in one request
_KEPT = "mlmamba.scores"  # the tag of a version that promotion reads


def finish(folder: Path, facts: dict[str, str]) -> dict:
    """Add intervals to scores.json and write the report, unless they are there. Returns the content of scores.json.

    Args:
        folder: of a finished evaluation.
        facts: for the report's head, by name.
    """
    result, intervals = read_scores(folder), None
    if "intervals" not in result:
        intervals = find_intervals(result, read_answers(folder))
        result["intervals"] = intervals.flat()
        write_scores(folder, result)
    if not (folder / REPORT / "done").exists():
        write_report(folder, folder / REPORT, facts, intervals)
        write_atomic(folder / REPORT / "done", "")
    return result


def flat_scores(result: dict, prefix: str = "") -> dict[str, float]:
    """All numbers of an evaluation under flat names, as a gate takes them: scores, and the ends of their intervals.

    Blind scores are called "blind/overall", ..., the majority's "majority/overall", ...
    """
    found = {**result["scores"], **result.get("intervals", {})}
    for part in ("blind", "majority"):
        found |= {f"{part}/{name}": value for name, value in result[part].items()}
    return {f"{prefix}{name}": value for name, value in found.items() if math.isfinite(value)}


def log_evaluation(client: MlflowClient, run_id: str, name: str, folder: Path, result: dict) -> None:
    """Log an evaluation to a run: its numbers under NAME/..., its files under evaluation/NAME.

    Args:
        name: of the benchmark; metrics of a partial one are called NAME/partial/...; characters that MLflow refuses
            are written as workflows/tracking/tracker.py says.
    """
    prefix = f"{name}/" if result.get("complete", True) else f"{name}/partial/"
    now = int(time.time() * 1000)
    metrics = [Metric(key, value, now, 0) for key, value in metric_names(flat_scores(result, prefix)).items()]
    for first in range(0, len(metrics), _AT_ONCE):
        client.log_batch(run_id, metrics=metrics[first : first + _AT_ONCE])
    client.log_artifact(run_id, str(folder / SCORES), f"evaluation/{name}")
    for file in sorted((folder / REPORT).glob("*")):
        if file.suffix in (".html", ".png"):
            client.log_artifact(run_id, str(file), f"evaluation/{name}")


def log_to_version(client: MlflowClient, name: str, version: str, benchmark: str, folder: Path, result: dict) -> None:
    """Log an evaluation to the run of a model version, and add its scores to those that promotion looks at.

    A partial evaluation is logged, but never a reason to promote.
    """
    found = client.get_model_version(name, version)
    log_evaluation(client, found.run_id, benchmark, folder, result)
    if result.get("complete", True):
        kept = result["scores"] | result.get("intervals", {})
        known = read_tag(found.tags, _KEPT, dict[str, float], {})
        known |= {f"{benchmark}/{key}": value for key, value in kept.items()}
        client.set_model_version_tag(name, version, _KEPT, json.dumps(known))


def _choose_example(evaluation: Path, max_tokens: int) -> Example | None:
    """The first item of a finished evaluation that has an image which can be read and an answer; None without any.

    Args:
        evaluation: its folder.
        max_tokens: longest answer that it allowed.
    """
    scores = read_scores(evaluation)
    for row in read_answers(evaluation):
        if not row.prediction:
            continue
        try:
            image = read_image(scores, row)
        except (OSError, ValueError):
            continue
        if image is not None:
            return Example(image, row.prompt or row.question, row.prediction, max_tokens)
    return None
