"""Reading a recipe and its --set overrides, with errors that name the file, the field, the value and the remedy.

A secret in a URI is refused wherever a recipe has text: a recipe is stored with its run in MLflow, travels with a
submitted job and is repeated in messages. What opens an object store belongs in the environment, which none of these
have.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

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
        UsageError: the file cannot be read, is not YAML, does not describe a recipe, or has a secret in a URI.
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
    for override in overrides or []:  # before any message repeats it
        refuse_secrets(override, f"--set {override.partition('=')[0].partition('://')[0]}")
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
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {file} is not valid YAML: {error}") from error
    except yaml.YAMLError as error:  # without the line itself, which may hold a secret
        raise UsageError(f"recipe {file} is not valid YAML: {_problem(error)}") from None
    if not isinstance(content, dict):
        raise UsageError(f"recipe {file} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    for place, text in texts(content):
        refuse_secrets(text, f"recipe {file}: {place}")
    return file, content


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML file and where."""
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or type(error).__name__}{where}"


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
            lines.append(f"  {place}: unknown key; {_hint(kind, item['loc'])}")
        elif item["type"] == "missing":
            lines.append(f"  {place}: missing, and it has no default")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], dict | list) else f" (given: {item['input']!r})"
            lines.append(f"  {place}: {message}{given}")
    return lines


def _hint(kind: type[BaseModel], place: tuple) -> str:
    """What was meant by an unknown key: a field beside it, or one of that very name elsewhere, the nearest first."""
    *parents, name = place
    fields = _fields_at(kind, tuple(parents))
    if guess := difflib.get_close_matches(str(name), fields, n=1):
        return f"did you mean {guess[0]!r}?"
    above = ".".join(str(part) for part in parents)
    # Kinds of sources have fields of one name that are no use to each other, so none is guessed from another section.
    elsewhere = [path for path in _paths(kind) if path.rpartition(".")[2] == name and not path.startswith("data.")]
    if elsewhere and parents[:1] != ["data"]:
        nearest = min(elsewhere, key=lambda path: (not path.startswith(f"{above}."), path.count("."), path))
        return f"did you mean {nearest}?"
    return f"remove it. There are {', '.join(sorted(fields))}"


def _paths(kind: type[BaseModel], above: str = "", within: tuple = ()) -> Iterator[str]:
    """The dotted paths of all fields of a model and of the models in it; a list's items are N."""
    for name, field in kind.model_fields.items():
        yield f"{above}{name}"
        number = "N." if get_origin(field.annotation) is list else ""
        for inner in dict.fromkeys(t for t in _types(field.annotation) if _is_model(t) and t not in within):
            yield from _paths(inner, f"{above}{name}.{number}", (*within, inner))


def _fields_at(kind: type[BaseModel], place: tuple) -> list[str]:
    """Names of the fields of what stands at a place of an error, which names a union's member by its tag."""
    found = [kind]
    for part in place:
        if isinstance(part, int):
            continue
        inner = [model.model_fields[part] for model in found if part in model.model_fields]
        if inner:
            found = [t for field in inner for t in _types(field.annotation) if _is_model(t)]
        else:
            found = [model for model in found if part in _tags(model)] or found
    return list(dict.fromkeys(name for model in found for name in model.model_fields))


def _tags(model: type[BaseModel]) -> set[str]:
    """The values that mark a model within a union."""
    return {tag for field in model.model_fields.values() for tag in get_args(field.annotation) if isinstance(tag, str)}


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _types(annotation: Any) -> list[Any]:
    inner = getattr(annotation, "__args__", ())
    return [annotation, *(t for arg in inner for t in _types(arg))]


_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_NAMES_ALONE = ("abfs", "abfss", "wasb", "wasbs", "hdfs", "viewfs", "ssh", "sftp", "scp", "git+ssh", "svn+ssh")
"""Schemes where what stands before an @ names a container or a user, and is no secret without a password."""
_SECRET = re.compile(
    r"(?:^|_)(?:pass|passwd|password|pwd|secret|token|credentials?|key|keys|auth|authorization|sig|signature|sas|apikey)"
    r"(?:_|$)|^(?:aws|x)?(?:access|secret|account|api|private|client)_?(?:key|secret)(?:_?id)?$"
)


def secret_in(uri: str) -> str | None:
    """What secret a URI holds, in words, or None.

    A password or user before the host, and a query's or fragment's access_key, secret_key, token, signature and the
    like. A user alone is none where the scheme writes a container or a login there, nor gs://anonymous@bucket.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return None
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    name, colon, password = user.partition(":")
    if at and colon and password:
        return "a password before the host"
    if at and name and scheme.lower() not in _NAMES_ALONE and name != "anonymous":
        return "a user before the host"
    if not at and "@" in rest and re.search(r"^[^\[:]*:(?!\d*$)", authority):  # a key with a / in it, written as it is
        return "a password before the host"
    _, _, query = rest.partition("?")
    for option in re.split(r"[?&;#]", query or rest.partition("#")[2]):
        name, _, value = option.partition("=")
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
        if value and _SECRET.search(words):
            return f"a value for {name}"
    return None


def without_secrets(text: str) -> str:
    """A text for messages, in which of each URI with a secret only its scheme, host and path are left."""
    return _URI.sub(lambda match: _bare(match[0]) if secret_in(match[0]) else match[0], text)


def refuse_secrets(text: str, place: str) -> None:
    """Raise UsageError that names the place, the kind of secret and the remedy, when a URI in a text holds a secret."""
    for match in _URI.finditer(text):
        if found := secret_in(match[0]):
            raise UsageError(
                f"{place}: {_bare(match[0])} holds {found}: leave it out, for a recipe is stored with its run and "
                "travels with a job, where others read it; credentials come from the environment (AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, ...) or the machine's role"
            )


def texts(content: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """The place and value of each text in nested lists and mappings, the keys included."""
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, dict):
        for key, value in content.items():
            inside = without_secrets(f"{place}.{key}" if place else str(key))
            yield inside, str(key)
            yield from texts(value, inside)
    elif isinstance(content, list | tuple | set):
        for i, value in enumerate(content):
            yield from texts(value, f"{place}.{i}")


def _bare(uri: str) -> str:
    scheme, mark, rest = uri.partition("://")
    return scheme + mark + re.split(r"[?#]", rest.rpartition("@")[2], maxsplit=1)[0]
