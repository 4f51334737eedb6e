"""The recipe's page: every field of `Recipe` and `DataRecipe`, and the shipped recipes."""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from docs.generate.schema import GENERATED, bases, code, link, prose, reachable, section, table
from mlmamba import images
from workflows.cli import VERBS
from workflows.recipe.load import RECIPES
from workflows.recipe.schema import DataRecipe, Recipe
from workflows.serve import http as app
from workflows.serve import openai as errors
from workflows.serve import openai as schema
from workflows.serve.deployment import ServeOptions

_INTRODUCTION = """\
A recipe is a YAML file, an instance of [Recipe](#recipe) and nothing else. Unknown keys are errors. `--set
train.stages.1.epochs=2` changes a field from the command line; list items are addressed by number. Rules that tie
several fields together are checked when the recipe is read, and their messages say what to change.

`required` means that there is no default, `none` that the field may be left out."""


def recipe_page() -> str:
    """The whole page."""
    models = reachable(Recipe)
    sections = [section(model, _stands_at(places) or _kinds(model, [*models])) for model, places in models.items()]
    sections += [section(model) for model in reachable(DataRecipe) if model not in models]
    return "\n\n".join([GENERATED, "# Recipe", _INTRODUCTION, _shipped(), *sections]) + "\n"


def _stands_at(places: list[str]) -> str:
    return f"At {', '.join(f'`{place}`' for place in places)}." if places else ""


def _kinds(base: type[BaseModel], models: list[type[BaseModel]]) -> str:
    kinds = [link(model.__name__) for model in models if base in bases(model)]
    return f"Shared by {', '.join(kinds)}." if kinds else ""


def _shipped() -> str:
    rows = [[f"`{_name(file)}`", _first_sentence(file)] for file in sorted(RECIPES.rglob("*.yaml"))]
    head = "## Shipped recipes\n\nThe commands take these by name; `data/...` describe a data set only."
    return f"{head}\n\n{table(['name', 'what it is'], rows)}"


def _name(file: Path) -> str:
    return file.relative_to(RECIPES).with_suffix("").as_posix()


def _first_sentence(file: Path) -> str:
    """Of the comment at the head of a recipe."""
    words = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words += line.removeprefix("#").split()
    text = " ".join(words)
    end = next((i for i in range(len(text)) if text[i : i + 2] == ". "), len(text))
    return text[:end].rstrip(".") + "."


_INTRODUCTION = """\
Results go to stdout, progress and messages to stderr. Every verb takes `--json`, which prints its result for machines,
and `--help`. Exit codes: 0 done, 1 failed, 2 bad usage or recipe; an error is one message that says what to do."""


def command_page() -> str:
    """The whole page."""
    return "\n\n".join([GENERATED, "# Command line", _INTRODUCTION, *map(_verb, VERBS)]) + "\n"


def _verb(name: str) -> str:
    parser = argparse.ArgumentParser(prog=f"mlmamba {name}", add_help=False)
    VERBS[name].arguments(parser)
    return _section(parser, VERBS[name].run.__doc__ or "")


def _section(parser: argparse.ArgumentParser, about: str) -> str:
    """A parser's heading, usage and arguments, and those of its own verbs below it."""
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]  # argparse tells no other way
    groups = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    actions = [action for action in actions if action not in groups and "--help" not in action.option_strings]
    usage = " ".join([parser.prog, *("ACTION" for _ in groups), *map(_usage, actions)])
    parts = [f"## {parser.prog}", f"{about[:1].upper()}{about[1:]}.", f"```text\n{usage}\n```"]
    if actions:
        parts.append(table(["argument", "meaning"], [[code(_shown(a)), _meaning(a)] for a in actions]))
    for group in groups:
        helps = {choice.dest: choice.help or "" for choice in group._choices_actions}
        parts += [_section(sub, helps.get(name, "")) for name, sub in group.choices.items()]
    return "\n\n".join(parts)


def _shown(action: argparse.Action) -> str:
    """An argument as a person types it."""
    if not action.option_strings:
        return str(action.metavar or action.dest).upper()
    value = _value(action)
    return f"{action.option_strings[-1]} {value}".strip()


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    name = str(action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper()))
    return {"?": f"[{name}]", "+": f"{name} [{name} ...]", "*": f"[{name} ...]"}.get(action.nargs, name)


def _usage(action: argparse.Action) -> str:
    optional = (bool(action.option_strings) and not action.required) or action.nargs in ("?", "*")
    return f"[{_shown(action)}]" if optional else _shown(action)


def _meaning(action: argparse.Action) -> str:
    """The help, with the choices and the default where it does not say them."""
    text = action.help or ""
    if action.choices and not action.option_strings:
        text = f"{text} ({', '.join(map(str, action.choices))})" if not _names_all(text, action.choices) else text
    if isinstance(action, argparse._AppendAction):
        text += " (may be given several times)"
    default = action.default
    if "default" not in text and default not in (None, False, True, []) and default is not argparse.SUPPRESS:
        text += f" (default: {default})"
    return text.strip()


def _names_all(text: str, choices) -> bool:
    return all(str(choice) in text for choice in choices)


_OPTIONS = """\
## Options of a service

`mlmamba serve` has the [common ones](cli.md#mlmamba-serve). A Serve config file has all of them, under `args` of the
application `workflows.serve.deployment:application`."""


def http_page() -> str:
    """The whole page."""
    requests = [section(model) for model in reachable(schema.ChatRequest)]
    options = [section(model, _place(places)) for model, places in reachable(ServeOptions).items()]
    head = [GENERATED, "# HTTP interface", prose(app.__doc__), prose(schema.__doc__)]
    return "\n\n".join([*head, *requests, _errors(), _OPTIONS, *options]) + "\n"


def _place(places: list[str]) -> str:
    return f"At {', '.join(map(code, places))}." if places else ""


def _errors() -> str:
    """Every code with its status and the message of the place where it is raised first."""
    found: dict[tuple[str, str], str] = {}
    for file in [*sorted(Path(errors.__file__).parent.glob("*.py")), Path(images.__file__)]:
        for status, name, message in raised(ast.parse(file.read_text(encoding="utf-8"))):
            if name != "image_missing":  # of paths and addresses, which only the processor takes
                found.setdefault((name, status), message)
    rows = [[code(name), status, message] for (name, status), message in sorted(found.items())]
    return f"## Errors\n\n{prose(errors.__doc__)}\n\n{table(['code', 'status', 'for example'], rows)}"


_ERRORS = ("ApiError", "bad_request", "ImageError")


def raised(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Status, code and message of every ApiError and ImageError with fixed ones; parts that vary are three dots."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    for call in sorted(calls, key=lambda call: call.lineno):
        if getattr(call.func, "id", None) not in _ERRORS:
            continue
        given = dict(enumerate(call.args)) | {keyword.arg: keyword.value for keyword in call.keywords}
        if call.func.id == "ApiError":
            status, message, name = given.get(0), given.get(1), given.get("code", given.get(3))
        elif call.func.id == "ImageError":
            status, message, name = ast.Constant(400), given.get(1), given.get(0)
        else:
            status, message, name = ast.Constant(400), given.get(0), given.get("code", given.get(2))
        if isinstance(status, ast.Constant) and isinstance(name, ast.Constant) and name.value and message is not None:
            yield str(status.value), name.value, _text(message)


def _text(message: ast.expr) -> str:
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        return "".join(_text(part) for part in message.values)
    return "..."
