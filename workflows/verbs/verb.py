"""What a verb is, and the arguments that several share. Light on imports: `mlmamba --help` reads every verb's file."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One verb of the command.

    `run` takes the parsed arguments and returns what --json prints; a dict's `text` is for a person, and its `failed`
    makes the exit code 1. Its docstring is the verb's help. `arguments` adds the verb's own arguments to its parser.
    """

    run: Callable[[argparse.Namespace], dict | list | None]
    arguments: Callable[[argparse.ArgumentParser], None]


class Renamed(argparse.Action):
    """The earlier name of an option: its value goes where the new one's does, with a note."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        now = f"--{self.dest.replace('_', '-')}"
        print(f"mlmamba: {option_string} is called {now} now; the old name is still read", file=sys.stderr)
        setattr(namespace, self.dest, values)


def recipe_argument(parser: argparse.ArgumentParser) -> None:
    """RECIPE and --set."""
    parser.add_argument("recipe", help="recipe file, or the name of a shipped one (quickstart)")
    set_option(parser)


def set_option(parser: argparse.ArgumentParser) -> None:
    """--set KEY.PATH=VALUE."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="change the recipe")


def precision_option(parser: argparse.ArgumentParser) -> None:
    """--precision, None where it is not given."""
    text = "what the model computes in: bf16, fp32, int8 (on a CPU), or auto (default: bf16 on a GPU, else as saved)"
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32", "int8"), help=text)


def exact_option(parser: argparse.ArgumentParser) -> None:
    """--exact, None where it is not given."""
    text = "the same bits whatever the batch, the pieces of prompts and kept states (pure Mamba-2, on a CPU)"
    parser.add_argument("--exact", action="store_true", default=None, help=text)


def storage_option(parser: argparse.ArgumentParser, remote: bool = False) -> None:
    """--storage, which `remote` lets be an object store."""
    kinds = "folder, or s3://bucket/folder," if remote else "folder"
    parser.add_argument("--storage", default="storage", help=f"{kinds} of everything that is made (default: storage)")


def recipe_and_storage(a: argparse.Namespace):
    """The recipe and the storage folder that the arguments name. Raises UsageError."""
    from workflows.recipe.load import load_recipe
    from workflows.storage.layout import open_storage

    return load_recipe(a.recipe, a.set), open_storage(a.storage)


def open_console(loading: bool = False):
    """Progress for a person, on stderr.

    Args:
        loading: say that the libraries are being loaded, which takes seconds before anything else can be said.
    """
    from workflows.console import Console

    console = Console()
    if loading:
        console.line("loading the libraries ...")
    return console
