"""Reading a recipe and its --set overrides, with errors that name the file, the field, the value and the remedy."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from workflows.errors import UsageError
from workflows.recipe.schema import DataRecipe, Recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file, or the name of a shipped recipe.
        overrides: "key.path=value" strings; values are YAML, list items are addressed by number.

    Raises:
        UsageError: the file cannot be read, is not YAML, or does not describe a recipe.
    """
    recipe = load_any(path, overrides)
    if isinstance(recipe, DataRecipe):
        raise UsageError(
            f"{path} describes a data set only, which mlmamba prepare makes; to train on it, write `data: {path}` in a "
            "recipe with a model"
        )
    return recipe


def load_any(path: str, overrides: list[str] | None = None) -> Recipe | DataRecipe:
    """Read a recipe, or a data recipe, which is what has neither model nor stages. As `load_recipe`."""
    file, content = _read(path)
    _fill_in_data(content)
    for override in overrides or []:
        _apply(content, override)
    _fill_in_data(content)
    kind = Recipe if {"model", "train"} & {*content} or "tokens_per_image" not in content else DataRecipe
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"recipe {file} is wrong:\n" + "\n".join(_lines(error, kind))) from error


def _read(path: str) -> tuple[Path, dict]:
    """A recipe file and its content."""
    file = Path(path)
    shipped = RECIPES / f"{path}.yaml"
    if not file.exists() and shipped.exists():
        file = shipped
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.rglob("*.yaml")))
        raise UsageError(f"cannot read recipe {path}: {error.strerror}. Shipped recipes: {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"recipe {file} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    return file, content


def _fill_in_data(content: dict) -> None:
    """Put the data sets of data recipes where their names stand, so that overrides can reach into them."""
    train = content.get("train")
    stages = train.get("stages") if isinstance(train, dict) else None
    for part in [content, *(stages if isinstance(stages, list) else [])]:
        if isinstance(part, dict) and isinstance(part.get("data"), str):
            file, recipe = _read(part["data"])
            if not isinstance(recipe.get("data"), dict) or "name" not in recipe:
                raise UsageError(f"data: {part['data']}: {file} has no name or no data of its own")
            part["data"] = {"name": recipe["name"], **recipe["data"]}


def _apply(content: Any, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise UsageError(f"--set {override}: write it as key.path=value")
    *parents, last = key.split(".")
    node = content
    for part in parents:
        node = _child(node, part, override)
    try:
        value = yaml.safe_load(text)
        if isinstance(node, list):
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise TypeError
    except (ValueError, IndexError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"--set {override}: cannot set {last!r} there") from error


def _child(node: Any, part: str, override: str) -> Any:
    try:
        if isinstance(node, list):
            return node[int(part)]
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UsageError(f"--set {override}: there is no {part!r} to go into") from error


def _lines(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            guess = difflib.get_close_matches(str(item["loc"][-1]), _all_fields(kind), n=1)
            hint = f"; did you mean {guess[0]!r}?" if guess else "; remove it"
            lines.append(f"  {place}: unknown key{hint}")
        elif item["type"] == "missing":
            lines.append(f"  {place}: missing, and it has no default")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], dict | list) else f" (given: {item['input']!r})"
            lines.append(f"  {place}: {message}{given}")
    return lines


def _all_fields(model: type[BaseModel]) -> list[str]:
    """Field names of a model and of every model below it."""
    names, todo, seen = [], [model], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for name, field in current.model_fields.items():
            names.append(name)
            todo += [t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
    return names


def _types(annotation: Any) -> list[Any]:
    inner = getattr(annotation, "__args__", ())
    return [annotation, *(t for arg in inner for t in _types(arg))]
