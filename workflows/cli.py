"""The `mlmamba` command: one flat table of verbs, each a thin call.

Results go to stdout (JSON with --json), progress and messages to stderr. Exit codes: 0 done, 1 failed, 2 bad usage or
recipe. Heavy libraries are imported by the verb that needs them, so that --help is quick.
"""

import argparse
import json
import sys
from collections.abc import Callable

from workflows.errors import UsageError, WorkflowError
from workflows.runtime import quiet_libraries

Verb = Callable[[argparse.Namespace], dict | list | None]


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns the exit code."""
    quiet_libraries()
    arguments = _parser().parse_args(argv)
    try:
        result = arguments.verb(arguments)
    except UsageError as error:
        print(f"mlmamba: {error}", file=sys.stderr)
        return 2
    except WorkflowError as error:
        print(f"mlmamba: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmlmamba: stopped; run the same command again to go on", file=sys.stderr)
        return 1
    failed = isinstance(result, dict) and result.pop("failed", False)
    if arguments.json and result is not None:
        print(
            json.dumps(
                {k: v for k, v in result.items() if k != "text"} if isinstance(result, dict) else result, indent=2
            )
        )
    elif result is not None:
        print(result["text"])
    return 1 if failed else 0


def run(a: argparse.Namespace) -> dict:
    """the whole workflow, resumable: prepare, train, evaluate, register, promote"""
    recipe, storage = _recipe_and_storage(a)
    from workflows.run import run_workflow, summary_text

    summary = run_workflow(recipe, storage, _console())
    return summary if a.json else {"text": summary_text(summary)}


def prepare(a: argparse.Namespace) -> dict:
    """data only: validate, tokenize, pack, write shards and manifest"""
    from workflows.layout import open_storage
    from workflows.recipe import load_any

    recipe, storage = load_any(a.recipe, a.set), open_storage(a.storage)
    from pipelines.verify import verify
    from workflows.run import prepare_sets

    console = _console()
    sets, texts = {}, []
    for folder, manifest in prepare_sets(recipe, storage, console).items():
        problems = verify(str(folder), console.preparation) if a.verify else []
        sets[str(folder)] = {**json.loads(manifest.model_dump_json()), "problems": problems}
        texts += [str(folder), f"digest {manifest.digest}", *problems]
        if a.verify and not problems:
            texts.append("verified: every shard is as the manifest says")
        if problems:
            texts.append(f"to make it again: delete {folder / 'manifest.json'} and run mlmamba prepare")
    failed = any(content["problems"] for content in sets.values())
    summary = {"data": sets, "phases": console.phases} if a.json else {}
    return {**summary, "failed": failed, "text": "\n".join(texts)}


def data(a: argparse.Namespace) -> dict:
    """look into a prepared data set: inspect"""
    from pipelines.contact_sheet import draw_sheet
    from pipelines.inspect import inspect_data
    from pipelines.inspect_text import report

    if a.samples < 1:
        raise UsageError(f"--samples {a.samples}: draw at least 1")
    try:
        content = inspect_data(a.uri)
        text = report(content)
        if a.sheet:
            content |= draw_sheet(a.uri, a.sheet, a.split, a.samples, a.seed)
            text += f"\n\nsamples: {content['sheet']}"
    except (OSError, ValueError) as error:
        raise WorkflowError(f"data inspect: {error}") from error
    return {**content, "text": text}


def train(a: argparse.Namespace) -> dict:
    """training only, all stages or --stage NAME"""
    recipe, storage = _recipe_and_storage(a)
    from workflows.build import image_tokens
    from workflows.layout import layout_of
    from workflows.run import prepare_data, train_stages
    from workflows.runtime import connect_ray
    from workflows.tracking import Tracker
    from workflows.train.trainer import check_cluster

    names = [stage.name for stage in recipe.train.stages]
    if a.stage not in (None, *names):
        raise UsageError(f"--stage {a.stage}: the recipe's stages are {', '.join(names)}")
    layout = layout_of(recipe, storage, image_tokens(recipe.model))
    connect_ray()
    check_cluster(recipe)
    console = _console()
    manifests = prepare_data(recipe, layout, console)
    tracker = Tracker(storage, recipe, layout.run.name)
    status = "FAILED"
    try:
        tracker.log_data(manifests, layout)
        model = train_stages(recipe, layout, manifests, console, tracker, a.stage)
        status = "FINISHED"
    finally:
        tracker.finish(status)
    return {"model": str(model), "run_id": tracker.run_id, "text": str(model)}


def evaluate(a: argparse.Namespace) -> dict:
    """score a model (folder or models:/NAME@ALIAS) on the test sources of a recipe"""
    recipe, storage = _recipe_and_storage(a)
    import tempfile
    from pathlib import Path

    from workflows.evaluate.runner import evaluate as score
    from workflows.evaluate.score import table
    from workflows.registry import resolve_model
    from workflows.runtime import connect_ray

    model = resolve_model(a.model, storage)
    console = _console()
    connect_ray()
    with console.step(f"evaluate {model.label}"), tempfile.TemporaryDirectory(dir=storage) as out:
        result = score(
            recipe, model.folder, Path(out), lambda done, n: console.progress(f"{done}/{n} batches", last=done == n)
        )
    return result if a.json else {"text": table(result)}


def models(a: argparse.Namespace) -> dict | list:
    """registered models: list"""
    from workflows.layout import open_storage
    from workflows.registry import list_models
    from workflows.tracking import connect

    rows = list_models(connect(open_storage(a.storage)))
    if a.json:
        return rows
    lines = [
        f"{row['name']}/{row['version']:<4} {','.join(row['aliases']) or '-':<12} "
        f"{' '.join(f'{kind} {value:.1%}' for kind, value in row['scores'].items())}"
        for row in rows
    ]
    return {"text": "\n".join(lines) or f"no registered models in {a.storage}"}


def serve(a: argparse.Namespace) -> None:
    """serve models:/NAME@ALIAS over HTTP, OpenAI style"""
    from workflows.layout import open_storage
    from workflows.serve.run import serve_model

    serve_model(a.model, open_storage(a.storage), a.host, a.port, replicas=a.replicas)


def chat(a: argparse.Namespace) -> dict | None:
    """ask a model one question about a picture, or talk to it"""
    from workflows.chat import answer_once, talk
    from workflows.layout import open_storage

    storage = open_storage(a.storage)
    if a.question is None:
        return talk(a.model, storage, a.image)
    answer = answer_once(a.model, storage, a.image, a.question, a.max_new_tokens)
    return {"answer": answer, "text": answer}


def convert(a: argparse.Namespace) -> dict:
    """turn a checkpoint of state-spaces, transformers or the ML-Mamba release into another layout"""
    from mlmamba.convert import convert as run

    try:
        done = run(
            a.source,
            a.destination,
            a.to,
            tokenizer=a.tokenizer,
            preset=a.preset,
            vision_weights=a.vision_weights,
            torch_file=a.torch_file,
        )
    except (OSError, ValueError) as error:
        raise WorkflowError(f"convert: {error}") from error
    text = f"{done.folder}: {done.layout}, {done.parameters:,} parameters (from {done.source_layout})"
    return {**done.as_dict(), "text": text}


def doctor(a: argparse.Namespace) -> dict:
    """what is installed, which kernels will be used, and what to do about what is missing"""
    from workflows.doctor import examine, report

    findings = examine()
    summary = {"findings": [finding.as_dict() for finding in findings]}
    return {**summary, "failed": any(f.state == "missing" for f in findings), "text": report(findings)}


VERBS: dict[str, Verb] = {
    "run": run,
    "prepare": prepare,
    "data": data,
    "train": train,
    "evaluate": evaluate,
    "models": models,
    "serve": serve,
    "chat": chat,
    "convert": convert,
    "doctor": doctor,
}
EXTRA_ARGUMENTS: dict[str, list[tuple[str, dict]]] = {
    "prepare": [("--verify", {"action": "store_true", "help": "read every shard back and compare with the manifest"})],
    "data": [
        ("action", {"choices": ["inspect"], "help": "inspect: counts, lengths, sources, what was set aside and why"}),
        ("uri", {"help": "the data set: a folder or s3://..., as prepare prints it"}),
        ("--sheet", {"metavar": "FILE.png", "help": "also draw sample pictures with their conversation and loss"}),
        ("--split", {"default": "train", "help": "split of the sheet (default: train)"}),
        ("--samples", {"type": int, "default": 12, "help": "samples on the sheet (default: 12)"}),
        ("--seed", {"type": int, "default": 0, "help": "draws other samples (default: 0)"}),
    ],
    "train": [("--stage", {"metavar": "NAME", "help": "only this stage"})],
    "evaluate": [
        ("model", {"help": "model folder or models:/NAME@ALIAS"}),
        ("--recipe", {"required": True, "help": "recipe whose data.test is asked"}),
    ],
    "models": [("action", {"choices": ["list"], "help": "list: versions, aliases and scores"})],
    "serve": [
        ("model", {"help": "models:/NAME@ALIAS or a model folder"}),
        ("--host", {"default": "127.0.0.1"}),
        ("--port", {"type": int, "default": 8000}),
        ("--replicas", {"type": int, "default": 1}),
    ],
    "chat": [
        ("model", {"help": "model folder or models:/NAME@ALIAS"}),
        ("--image", {"metavar": "FILE", "help": "the picture"}),
        ("--question", {"metavar": "TEXT", "help": "ask this and stop; without it, talk"}),
        ("--max-new-tokens", {"type": int, "default": 64}),
    ],
    "convert": [
        ("source", {"help": "released .pt file, or folder or hub name of a Mamba-2 language model or ML-Mamba model"}),
        ("destination", {"help": "folder to write; nothing may be there"}),
        (
            "--to",
            {
                "choices": ["mlmamba", "transformers", "state-spaces"],
                "help": "layout (default: mlmamba for a released file, transformers for a language model)",
            },
        ),
        (
            "--torch-file",
            {"action": "store_true", "help": "state-spaces: also pytorch_model.bin, which mamba_ssm opens"},
        ),
        ("--tokenizer", {"default": "EleutherAI/gpt-neox-20b", "help": "released file: its tokenizer"}),
        ("--preset", {"default": "2.7b", "help": "released file: the preset with its encoders (default: 2.7b)"}),
        (
            "--vision-weights",
            {"action": "append", "metavar": "FILE", "help": "released file: one per encoder (default: timm's, by hub)"},
        ),
    ],
}
TAKES_RECIPE = ("run", "prepare", "train")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlmamba", description="ML-Mamba from corpus to served model, on Ray.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.__doc__, description=verb.__doc__)
        if name in TAKES_RECIPE:
            sub.add_argument("recipe", help="recipe file, or the name of a shipped one (quickstart)")
        for flag, options in EXTRA_ARGUMENTS.get(name, []):
            sub.add_argument(flag, **options)
        if name in (*TAKES_RECIPE, "evaluate"):
            sub.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="change the recipe")
        if name not in ("data", "convert", "doctor"):
            sub.add_argument(
                "--storage", default="storage", help="folder of everything that is made (default: storage)"
            )
        sub.add_argument("--json", action="store_true", help="machine-readable result on stdout")
        sub.set_defaults(verb=verb)
    return parser


def _recipe_and_storage(a: argparse.Namespace):
    from workflows.layout import open_storage
    from workflows.recipe import load_recipe

    return load_recipe(a.recipe, a.set), open_storage(a.storage)


def _console():
    from workflows.console import Console

    return Console()


if __name__ == "__main__":
    sys.exit(main())
