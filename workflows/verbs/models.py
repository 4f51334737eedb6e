"""models: the registry."""

import argparse

from workflows.verbs.verb import Verb, storage_option


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


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list"], help="list: versions, aliases and scores")
    storage_option(parser)


MODELS = Verb(models, _arguments)
