"""run, prepare, train: a recipe's workflow, whole or in part; reshard: its checkpoint for other workers."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from workflows.errors import UsageError, WorkflowError
from workflows.verbs.verb import Verb, open_console, recipe_and_storage, recipe_argument, storage_option


def run(a: argparse.Namespace) -> dict:
    """the whole workflow, resumable: prepare, train, evaluate, register, promote"""
    if a.dry_run:
        return _plan(a)
    from workflows.run import run_workflow

    recipe, storage = recipe_and_storage(a)
    console = open_console()

    summary = run_workflow(recipe, storage, console)
    return {**summary, "text": summary_text(summary)}


def summary_text(summary: dict) -> str:
    """The summary for a person: a table of scores, where things are, what to try next."""
    from workflows.evaluate.results import table
    from workflows.storage.folder import Folder

    model, example = summary["model"], summary["example"]
    state = f"is {model['alias']}" if model["promoted"] else "not promoted (see the gate above)"
    reference = f"models:/{model['name']}@{model['alias']}" if model["promoted"] else _short(model["folder"])
    storage = Folder(summary["storage"])
    common = reference + ("" if storage.remote else f" --storage {_short(summary['storage'])}")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.local / 'mlflow.db'}"
    ui = f"  {_command('mlflow')} ui --backend-store-uri {uri}"
    return "\n".join(
        [
            "",
            table(summary["evaluation"]),
            "",
            f"model    {model['name']} version {model['version']}, {state}",
            f"         {_short(model['folder'])}",
            f"run      {summary['run_id']} (MLflow)",
            *(f"shards   {_short(folder)}" for folder in summary["data"]["folders"]),
            f"look at  {_short(summary['samples'])}",
            "",
            "next",
            f"  {_command('mlmamba')} chat {common} \\",
            f"      --image {_short(example['image'])} --question '{example['question']}'",
            f"  {_command('mlmamba')} serve {common}",
            *([] if storage.remote else [ui]),
        ]
    )


def _short(path: str) -> str:
    """A path as a person would type it: relative when it lies below the current folder."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def _command(name: str) -> str:
    """How to call a command of this environment: by its name when the shell finds it, else by its path."""
    if shutil.which(name):
        return name
    return os.path.relpath(Path(sys.executable).with_name(name))


def prepare(a: argparse.Namespace) -> dict:
    """data only: validate, tokenize, pack, write shards and manifest"""
    if a.dry_run:
        return _plan(a, training=False)
    from workflows.recipe.load import load_any
    from workflows.storage.layout import open_storage

    recipe, storage = load_any(a.recipe, a.set), open_storage(a.storage)
    console = open_console(loading=True)
    from pipelines.verify import verify
    from workflows.run import data_configs, prepare_sets

    sets, texts, made_from = {}, [], data_configs(recipe, storage)
    for folder, manifest in prepare_sets(recipe, storage, console).items():
        problems = verify(folder.uri, console.preparation, made_from[folder]) if a.verify else []
        sets[folder.shown] = {**json.loads(manifest.model_dump_json()), "problems": problems}
        texts += [folder.shown, f"digest {manifest.digest}", *problems]
        if a.verify and not problems:
            texts.append("verified: every shard is as the manifest says")
        if problems:
            texts.append(f"to make it again: delete {folder / 'manifest.json'} and run mlmamba prepare")
    failed = any(content["problems"] for content in sets.values())
    return {"data": sets, "phases": console.phases, "failed": failed, "text": "\n".join(texts)}


def train(a: argparse.Namespace) -> dict:
    """training only, all stages or --stage NAME"""
    if a.dry_run:
        return _plan(a)
    recipe, storage = recipe_and_storage(a)
    names = [stage.name for stage in recipe.train.stages]
    if a.stage not in (None, *names):
        raise UsageError(f"--stage {a.stage}: the recipe's stages are {', '.join(names)}")
    console = open_console()
    if a.find_lr:
        from workflows.verbs.find_rate import find_rate

        return find_rate(recipe, storage, console, a.stage)
    from workflows.run import train_only

    result = train_only(recipe, storage, console, a.stage)
    return {**result, "text": result["model"]}


def reshard(a: argparse.Namespace) -> dict:
    """the newest checkpoint of a run, for another number of workers"""
    from workflows.storage.folder import Folder

    console, run = open_console(loading=True), Folder(a.run_folder)
    from workflows.run import explained
    from workflows.train.reshard import reshard_run

    try:
        done = reshard_run(run, a.workers, a.stage, console.note)
    except OSError as error:
        known = explained(error, run)
        raise WorkflowError(f"reshard: {error}") if known is error else known from error
    about = {"stage": done.stage, "step": done.checkpoint.step, "made_by": done.made_by, "workers": done.workers}
    return {**about, "checkpoint": str(done.checkpoint), "bytes": done.size, "text": str(done)}


def _plan(a: argparse.Namespace, training: bool = True) -> dict:
    """What it would take; nothing is written, started or fetched."""
    from workflows.plan.data import parse_records, plan_data
    from workflows.plan.text import data_text, training_text
    from workflows.plan.train import machine_of, plan_training
    from workflows.recipe.load import load_any, load_recipe
    from workflows.recipe.schema import Recipe
    from workflows.storage.folder import Folder

    recipe = load_recipe(a.recipe, a.set) if training else load_any(a.recipe, a.set)
    storage, given = Folder(a.storage), parse_records(a.records)
    if not training or not isinstance(recipe, Recipe):
        plan = plan_data(recipe, storage, given, a.node_cpus)
        return {**plan, "text": data_text(plan)}
    plan = plan_training(recipe, storage, given, machine_of(recipe, a.peak_tflops, a.mfu, a.gpu_memory))
    return {**plan, "text": training_text(plan)}


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_argument(parser)
    storage_option(parser, remote=True)
    parser.add_argument("--dry-run", action="store_true", help="print what it would take, and start nothing")
    plan = parser.add_argument_group("with --dry-run")
    plan.add_argument(
        "--records",
        action="append",
        default=[],
        metavar="SOURCE=COUNT[xTOKENS]",
        help="records of a source that is not prepared, and tokens of text in each",
    )
    plan.add_argument("--peak-tflops", type=float, help="peak of one worker's device (default with GPUs: 312, A100)")
    plan.add_argument("--mfu", type=float, default=0.3, help="share of the peak that is reached (default: 0.3)")
    plan.add_argument("--node-cpus", type=int, default=16, help="CPUs of a node that prepares (default: 16)")
    plan.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU (default with GPUs: 80)")


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--verify", action="store_true", help="read every shard back and compare with the manifest")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--stage", metavar="NAME", help="only this stage")
    parser.add_argument(
        "--find-lr",
        action="store_true",
        help="train nothing: raise the learning rate step by step, and say which one the losses suggest",
    )


def _reshard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", metavar="RUN", help="the run's folder, STORAGE/runs/NAME, or s3://...; nothing may train in it"
    )
    parser.add_argument("--workers", type=int, required=True, metavar="N", help="how many will go on from it")
    parser.add_argument("--stage", metavar="NAME", help="of this stage, where several have checkpoints")


RUN = Verb(run, _run_arguments)
PREPARE = Verb(prepare, _prepare_arguments)
TRAIN = Verb(train, _train_arguments)
RESHARD = Verb(reshard, _reshard_arguments)
