"""The command's page: every verb with its arguments, read from the parsers that the verbs fill."""

import argparse

from workflows.cli import VERBS
from workflows.reference.markdown import GENERATED, code, table

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
