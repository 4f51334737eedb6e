"""models: the registry."""

import argparse

from workflows.errors import UsageError
from workflows.verbs.verb import Verb, storage_option

_ACTIONS = {
    "list": "every version, its aliases and scores",
    "show": "NAME: its versions and how its aliases moved; NAME/VERSION or NAME@ALIAS: one version",
    "promote": "NAME/VERSION: move the alias to it if its gate holds",
    "rollback": "NAME: move the alias back to the version before",
    "lineage": "NAME@ALIAS or NAME/VERSION: shards -> run -> model",
}


def models(a: argparse.Namespace) -> dict | list:
    """registered models: list, show, promote, rollback, lineage"""
    from workflows.storage.layout import open_local_storage
    from workflows.tracking.tracker import connect

    _check(a)
    client = connect(open_local_storage(a.storage))
    return {"list": _list, "show": _show, "promote": _promote, "rollback": _rollback, "lineage": _lineage}[a.action](
        client, a
    )


def _list(client, a: argparse.Namespace) -> dict | list:
    from workflows.registry import list_models
    from workflows.registry.show import version_lines

    rows = list_models(client)
    return rows if a.json else {"text": "\n".join(version_lines(rows)) or f"no registered models in {a.storage}"}


def _show(client, a: argparse.Namespace) -> dict:
    from workflows.registry import lineage, parse_reference, show_model
    from workflows.registry.show import model_text, version_text

    wanted = parse_reference(a.model)
    if wanted.version or wanted.alias:
        content = lineage(client, wanted)["model"]
        return {**content, "text": version_text(content)}
    content = show_model(client, wanted.name)
    return {**content, "text": model_text(content)}


def _promote(client, a: argparse.Namespace) -> dict:
    from workflows.registry import get_version, parse_reference, promote
    from workflows.registry.show import promotion_text

    version = get_version(client, parse_reference(a.model))
    alias = a.alias or "champion"
    done = promote(client, version.name, str(version.version), alias, force=a.force, reason=a.reason)
    return {**done.as_dict(), "failed": not done.holds, "text": promotion_text(done)}


def _rollback(client, a: argparse.Namespace) -> dict:
    from workflows.registry import parse_reference, rollback
    from workflows.registry.show import promotion_text

    wanted = parse_reference(a.model)
    if wanted.version or (wanted.alias and a.alias):
        raise UsageError(f"rollback {wanted}: give NAME (and --alias) or NAME@ALIAS; the version follows from history")
    done = rollback(client, wanted.name, a.alias or wanted.alias or "champion", a.reason)
    return {**done.as_dict(), "text": promotion_text(done)}


def _lineage(client, a: argparse.Namespace) -> dict:
    from workflows.registry import lineage
    from workflows.registry.show import lineage_text

    content = lineage(client, a.model)
    return {**content, "text": lineage_text(content)}


def _check(a: argparse.Namespace) -> None:
    """Raise UsageError for what the action has no use for, or lacks."""
    if a.action != "list" and a.model is None:
        raise UsageError(f"models {a.action} needs a model: {_ACTIONS[a.action]}")
    if a.action == "list" and a.model is not None:
        raise UsageError(f"models list takes no model; `mlmamba models show {a.model}` shows one")
    given = {"--alias": a.alias, "--force": a.force or None, "--reason": a.reason}
    taken = {"promote": set(given), "rollback": {"--alias", "--reason"}}.get(a.action, set())
    for option, value in given.items():
        if value is not None and option not in taken:
            raise UsageError(f"models {a.action} takes no {option}")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=list(_ACTIONS), help="; ".join(f"{name}: {text}" for name, text in _ACTIONS.items())
    )
    parser.add_argument("model", nargs="?", help="NAME, NAME/VERSION or NAME@ALIAS")
    parser.add_argument("--alias", help="promote, rollback: the alias that moves (default: champion)")
    parser.add_argument("--force", action="store_true", help="promote: move it although the gate does not hold")
    parser.add_argument("--reason", metavar="TEXT", help="promote, rollback: why; kept in the history, needed to force")
    storage_option(parser)


MODELS = Verb(models, _arguments)
