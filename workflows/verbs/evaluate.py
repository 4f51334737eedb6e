"""evaluate: the score of a model on a recipe's test sources or on a benchmark."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from workflows.errors import UsageError, WorkflowError
from workflows.verbs.verb import Renamed, Verb, exact_option, open_console, precision_option, set_option, storage_option

_COUNTS = ("questions", "max_new_tokens", "workers", "cpus_per_worker", "batch_images", "batch_questions")
_BENCHMARKS = "vqav2, gqa, vizwiz, textvqa, pope, vsr; llava or shards for data of your own"


def evaluate(a: argparse.Namespace) -> dict:
    """score a model (folder or models:/NAME@ALIAS) on a benchmark, or on the test sources of a recipe"""
    from workflows.storage.layout import open_local_storage

    if a.probe:
        return probe(a)
    _check(a)
    storage = open_local_storage(a.storage)
    benchmark, how, seed = _what(a)
    if a.compare:
        _check_comparable(a.compare, benchmark)
    if a.predictions:
        return _score_predictions(a, benchmark, storage)
    console = open_console(loading=True)
    from mlflow.exceptions import MlflowException

    from workflows.evaluate.run import evaluate_benchmark, evaluation_folder, finish, log_to_version, model_digest
    from workflows.registry import resolve_model
    from workflows.runtime import connect_ray
    from workflows.tracking.journal import short_reason
    from workflows.tracking.tracker import connect

    model = resolve_model(a.model, storage)
    with console.step(f"evaluate {model.label} on {benchmark.title}"):
        out = evaluation_folder(
            storage / "evaluations", benchmark, model_digest(model.folder), seed, a.max_new_tokens, how.computes_in
        )
        connect_ray(say=console.note)
        console.note(f"asking {len(benchmark.items):,} questions, when the workers have loaded the model ...")
        evaluate_benchmark(
            benchmark,
            model.folder,
            out,
            how,
            seed,
            a.max_new_tokens,
            a.allow_partial,
            model.label,
            lambda done, n: console.progress(f"{done}/{n} batches", last=done == n),
        )
        result = finish(out, {"model": model.label, "data digest": benchmark.digest, "precision": how.computes_in})
        if model.version:
            try:
                log_to_version(connect(storage), model.name, model.version, benchmark.title, out, result)
            except MlflowException as error:
                raise WorkflowError(
                    f"the scores are in {out}, but MLflow did not take them for {model.label}: {short_reason(error)}. "
                    "Run the same command again, it asks the model nothing twice"
                ) from error
    shown = _shown(result, out)
    return compared(a, shown, evaluate) if a.compare else shown


def _check(a: argparse.Namespace) -> None:
    """Raise UsageError for arguments that do not go together."""
    if (a.recipe is None) == (a.benchmark is None):
        raise UsageError(f"give --benchmark NAME --data DIR ({_BENCHMARKS}), or --recipe RECIPE")
    if a.benchmark and not a.data:
        raise UsageError(f"--benchmark {a.benchmark} needs --data DIR, the folder with its files as they are published")
    if a.recipe and (given := [name for name in ("data", "images", "split", "questions") if getattr(a, name)]):
        raise UsageError(f"--{given[0]} goes with --benchmark; a recipe says itself where its test sources are")
    if (a.model is None) == (a.predictions is None):
        raise UsageError("give a MODEL to ask, or --predictions FILE with answers made elsewhere")
    for name in _COUNTS:
        if (value := getattr(a, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; expected at least 1")


def _check_comparable(other: str, benchmark) -> None:
    """Raise UsageError, before the model is asked anything, where the other evaluation is of something else."""
    from workflows.evaluate.compare import check_same_benchmark
    from workflows.evaluate.results import read_answers, read_scores

    folder = Path(other)
    if (folder / "scores.json").is_file():
        check_same_benchmark(read_scores(folder)["benchmark"], benchmark.name)
        known, asked = {row.id for row in read_answers(folder)}, {item.id for item in benchmark.items}
        if not known & asked:
            raise UsageError(
                f"--compare {other}: it holds answers to {len(known):,} items, none of which is among the "
                f"{len(asked):,} of {benchmark.title}: give an evaluation of the same items"
            )


def _what(a: argparse.Namespace) -> tuple:
    """The benchmark, the workers that the arguments ask for, and the seed."""
    from workflows.evaluate.benchmarks import open_benchmark
    from workflows.evaluate.collect import Workers

    if a.recipe:
        from workflows.evaluate.benchmarks.own_data import TestSources
        from workflows.evaluate.run import workers_of
        from workflows.recipe.load import load_recipe

        recipe = load_recipe(a.recipe, a.set)
        benchmark, settings, seed = TestSources(recipe), vars(workers_of(recipe)), recipe.seed
    else:
        benchmark, settings, seed = open_benchmark(a.benchmark, a.data, a.images, a.split, a.questions), {}, 7
    given = {name: getattr(a, name) for name in Workers.__dataclass_fields__ if getattr(a, name) is not None}
    return benchmark, Workers(**settings | given), seed if a.seed is None else a.seed


def _score_predictions(a: argparse.Namespace, benchmark, storage: Path) -> dict:
    from workflows.evaluate.run import finish
    from workflows.evaluate.scoring import read_predictions, score_predictions

    file = Path(a.predictions)
    predictions = read_predictions(file)
    out = storage / "evaluations" / f"{benchmark.title.replace('/', '-')}-{file.stem}"
    score_predictions(benchmark, predictions, out, file.name, a.allow_partial)
    return _shown(finish(out, {"answers": str(file), "data digest": benchmark.digest}), out)


def _shown(result: dict, out: Path) -> dict:
    from workflows.evaluate.results import table
    from workflows.evaluate.run import REPORT

    return result | {"folder": str(out), "text": f"{table(result)}\n\nlook at  {out / REPORT}"}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="model folder or models:/NAME@ALIAS")
    parser.add_argument("--benchmark", metavar="NAME", help=_BENCHMARKS)
    parser.add_argument("--data", metavar="DIR", help="folder with the benchmark's files as they are published")
    parser.add_argument("--images", metavar="DIR", help="folder or zip of its images, if it is not below --data")
    parser.add_argument("--split", help="of vsr: zeroshot or random; of shards: validation or train")
    parser.add_argument(
        "--questions", type=int, metavar="N", help="the files have N questions, which is not what was published"
    )
    parser.add_argument("--recipe", help="ask data.test of this recipe instead")
    parser.add_argument("--predictions", metavar="FILE", help="score these answers (JSON of id and answer), no model")
    parser.add_argument("--allow-partial", action="store_true", help="score what there is, marked as partial")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the protocol's)")
    parser.add_argument("--seed", type=int, help="of the choice of the other images (blind)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes, each with a copy of the model")
    parser.add_argument("--cpus-per-worker", type=int, metavar="N", help="CPU cores of one process")
    parser.add_argument("--gpus-per-worker", type=float, metavar="N", help="GPUs of one process; 0.5 shares one")
    parser.add_argument("--batch-images", type=int, metavar="N", help="images in one batch")
    parser.add_argument(
        "--batch-pictures", type=int, metavar="N", dest="batch_images", action=Renamed, help=argparse.SUPPRESS
    )
    parser.add_argument("--batch-questions", type=int, metavar="N", help="most questions in one forward pass")
    precision_option(parser)
    exact_option(parser)
    more_arguments(parser)
    set_option(parser)
    storage_option(parser)


EVALUATE = Verb(evaluate, _arguments)


PROBES = ("scaling",)


def probe(a: argparse.Namespace) -> dict:
    """Run a probe on a model and write its files. Raises UsageError for lengths that make no probe."""
    from mlmamba.loading import load_model
    from workflows.evaluate.probe import BATCHES, LENGTHS, probe_scaling
    from workflows.evaluate.probe_report import text, write_probe
    from workflows.registry import resolve_model
    from workflows.storage.layout import open_local_storage
    from workflows.tracking.tracker import connect

    if a.model is None:
        raise UsageError(f"--probe {a.probe} needs a MODEL")
    storage = open_local_storage(a.storage)
    source = resolve_model(a.model, storage)
    model, _ = load_model(source.folder)
    console = open_console()
    with console.step(f"probe {source.label}"):
        try:
            found = probe_scaling(
                model,
                a.lengths or LENGTHS,
                a.batches or BATCHES,
                a.rounds,
                lambda done, n: console.progress(f"{done}/{n} measurements", last=done == n),
            )
        except ValueError as error:
            raise UsageError(f"--probe {a.probe}: {error}") from error
        files = write_probe(found, storage / "probes" / f"scaling-{source.label.replace('/', '-')}")
        if source.version:
            for file in files:
                connect(storage).log_artifact(source.run_id, str(file), "probe")
    shown = "\n".join(f"look at  {file}" for file in files if file.suffix == ".png")
    return {**found.as_dict(), "files": [str(file) for file in files], "text": f"{text(found)}\n\n{shown}"}


def compared(a: argparse.Namespace, result: dict, evaluate: Callable[[argparse.Namespace], dict]) -> dict:
    """The result with the paired comparison to `--compare`: a finished evaluation's folder, or a model to ask first.

    Raises:
        UsageError: the other evaluation is of other items.
    """
    from pipelines.storage import write_atomic
    from workflows.evaluate.compare import compare_folders

    other = Path(a.compare)
    if not (other / "scores.json").is_file():
        asked = evaluate(argparse.Namespace(**(vars(a) | {"model": a.compare, "compare": None})))
        other = Path(asked["folder"])
    found = compare_folders(other, Path(result["folder"]))
    write_atomic(Path(result["folder"]) / f"compare-{other.name}.json", json.dumps(found.as_dict(), indent=2))
    return result | {"comparison": found.as_dict(), "text": f"{result['text']}\n\n{found.text()}"}


def more_arguments(parser: argparse.ArgumentParser) -> None:
    """--compare, --probe and what goes with it."""
    parser.add_argument(
        "--compare", metavar="OTHER", help="paired interval of the difference to another model, or evaluation's folder"
    )
    parser.add_argument("--probe", choices=PROBES, help="speed and memory against a Transformer of the same size")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="--probe: prompt lengths in tokens")
    parser.add_argument("--batches", type=int, nargs="+", metavar="N", help="--probe: prompts at once")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="--probe: the best of N (default: 3)")
