"""run, prepare, train: a recipe's workflow, whole or in part."""

import argparse
import json

from workflows.errors import UsageError
from workflows.verbs.verb import Verb, open_console, recipe_and_storage, recipe_argument, storage_option


def run(a: argparse.Namespace) -> dict:
    """the whole workflow, resumable: prepare, train, evaluate, register, promote"""
    recipe, storage = recipe_and_storage(a)
    from workflows.run import run_workflow, summary_text

    summary = run_workflow(recipe, storage, open_console())
    return summary if a.json else {"text": summary_text(summary)}


def prepare(a: argparse.Namespace) -> dict:
    """data only: validate, tokenize, pack, write shards and manifest"""
    from workflows.layout import open_storage
    from workflows.recipe import load_any

    recipe, storage = load_any(a.recipe, a.set), open_storage(a.storage)
    from pipelines.verify import verify
    from workflows.run import prepare_sets

    console = open_console()
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


def train(a: argparse.Namespace) -> dict:
    """training only, all stages or --stage NAME"""
    recipe, storage = recipe_and_storage(a)
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
    console = open_console()
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


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_argument(parser)
    storage_option(parser)


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--verify", action="store_true", help="read every shard back and compare with the manifest")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--stage", metavar="NAME", help="only this stage")


RUN = Verb(run, _run_arguments)
PREPARE = Verb(prepare, _prepare_arguments)
TRAIN = Verb(train, _train_arguments)
