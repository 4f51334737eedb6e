"""What `evaluate` does besides scoring: the scaling probe, and the comparison with another model."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from workflows.errors import UsageError
from workflows.verbs.verb import open_console

PROBES = ("scaling",)


def probe(a: argparse.Namespace) -> dict:
    """Run a probe on a model and write its files. Raises UsageError for lengths that make no probe."""
    from mlmamba.loading import load_model
    from workflows.evaluate.probe import BATCHES, LENGTHS, probe_scaling
    from workflows.evaluate.probe_report import text, write_probe
    from workflows.layout import open_storage
    from workflows.registry import resolve_model
    from workflows.tracking import connect

    if a.model is None:
        raise UsageError(f"--probe {a.probe} needs a MODEL")
    storage = open_storage(a.storage)
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
    from workflows.evaluate.compare import compare_folders
    from workflows.layout import write_atomic

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
