"""From a benchmark and a model to the evaluation folder: look, ask, check that nothing is missing, score, write.

A score is made only when every item was answered once; otherwise the error says which are missing. Asked to
(`allow_partial`), it scores what there is, and the result says that it is partial. Greedy answers to questions asked
alone do not depend on batches, workers or order, and neither does the choice of the other pictures.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from mlmamba.processing import MLMambaProcessor
from workflows.config import Recipe
from workflows.errors import WorkflowError
from workflows.evaluate.answer import first_tokens
from workflows.evaluate.assemble import Incomplete, missing_items, row_of, write_result
from workflows.evaluate.benchmarks.base import Benchmark
from workflows.evaluate.benchmarks.recipe import TestSources
from workflows.evaluate.collect import BLIND, SEEING, Workers, blind_pictures, collect
from workflows.evaluate.prompts import bad_prompts
from workflows.evaluate.results import SCORES, read_scores

OnProgress = Callable[[int, int], None]


def evaluate(recipe: Recipe, model: Path, out: Path, on_progress: OnProgress = lambda done, total: None) -> dict:
    """Score a model on the recipe's test sources. The rest as `evaluate_benchmark`."""
    benchmark = TestSources(recipe)
    return evaluate_benchmark(benchmark, model, out, workers_of(recipe), recipe.seed, on_progress=on_progress)


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
) -> dict:
    """Score a model on a benchmark, seeing and blind.

    Args:
        model: model folder.
        out: folder for what results.py describes; a finished one is read, not repeated. It must be of this model, these
            items, this seed and this length of answers alone (workflows/evaluate/place.py).
        how: workers and batches.
        seed: of the choice of the other pictures.
        max_new_tokens: longest answer; the protocol's by default.
        allow_partial: score what there is when items are missing.
        label: what a person calls the model.
        on_progress: called with batches done and in all.

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
    others = blind_pictures([item for item in benchmark.items if item.id not in cannot], seed)
    replies = collect(benchmark, model, out, how, max_new_tokens or benchmark.max_new_tokens, others, on_progress)
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
