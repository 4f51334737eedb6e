"""evaluate: the score of a model."""

import argparse

from workflows.verbs.verb import Verb, open_console, recipe_and_storage, set_option, storage_option


def evaluate(a: argparse.Namespace) -> dict:
    """score a model (folder or models:/NAME@ALIAS) on the test sources of a recipe"""
    recipe, storage = recipe_and_storage(a)
    import tempfile
    from pathlib import Path

    from workflows.evaluate.runner import evaluate as score
    from workflows.evaluate.score import table
    from workflows.registry import resolve_model
    from workflows.runtime import connect_ray

    model = resolve_model(a.model, storage)
    console = open_console()
    connect_ray()
    with console.step(f"evaluate {model.label}"), tempfile.TemporaryDirectory(dir=storage) as out:
        result = score(
            recipe, model.folder, Path(out), lambda done, n: console.progress(f"{done}/{n} batches", last=done == n)
        )
    return result if a.json else {"text": table(result)}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder or models:/NAME@ALIAS")
    parser.add_argument("--recipe", required=True, help="recipe whose data.test is asked")
    set_option(parser)
    storage_option(parser)


EVALUATE = Verb(evaluate, _arguments)
