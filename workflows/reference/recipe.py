"""The recipe's page: every field of `Recipe` and `DataRecipe`, and the shipped recipes."""

from pathlib import Path

from pydantic import BaseModel

from workflows.config import DataRecipe, Recipe
from workflows.recipe import RECIPES
from workflows.reference.markdown import GENERATED, link, table
from workflows.reference.schema import bases, reachable, section

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
