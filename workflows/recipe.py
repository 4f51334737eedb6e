"""Reading a recipe and its --set overrides, with errors that name the file, the field, the value and the remedy."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from workflows.config import Recipe
from workflows.errors import UsageError

RECIPES = Path(__file__).parent / "recipes"


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file, or the bare name of a shipped recipe.
        overrides: "key.path=value" strings; values are YAML, list items are addressed by number.

    Raises:
        UsageError: the file cannot be read, is not YAML, or does not describe a recipe.
    """
    file = Path(path)
    shipped = RECIPES / f"{path}.yaml"
    if not file.exists() and shipped.exists():
        file = shipped
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise UsageError(f"cannot read recipe {path}: {error.strerror}. Shipped recipes: {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"recipe {file} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides or []:
        _apply(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"recipe {file} is wrong:\n" + "\n".join(_lines(error))) from error


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


def _lines(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            guess = difflib.get_close_matches(str(item["loc"][-1]), _all_fields(Recipe), n=1)
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
