"""A workflow made ready to travel: its recipe in one piece, what the cluster needs to have, and who sends it.

The files that travel with it are chosen in package.py.
"""

import getpass
import importlib.metadata
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import yaml

from pipelines.config import DataConfig
from pipelines.identity import digest
from pipelines.storage import join, shown
from workflows.errors import UsageError
from workflows.recipe.load import load_any, load_recipe, refuse_secrets, secret_in, without_secrets
from workflows.recipe.schema import DataRecipe, Recipe
from workflows.runtime import REQUIRED
from workflows.storage.folder import Folder
from workflows.storage.layout import data_folder, run_name
from workflows.storage.remote import is_remote
from workflows.submit.package import JOB_FOLDER
from workflows.tracking.tracker import git_revision
from workflows.train.initial import image_tokens


@dataclass(frozen=True)
class Submission:
    """One workflow as the cluster knows it."""

    run: str
    """Name of the run folder: the recipe's name and digest."""
    storage: str

    @property
    def prefix(self) -> str:
        """Beginning of the ids of its jobs."""
        return f"{self.run}-{digest(self.storage)[:4]}-"


_PYTHON = "3.11"
_START = Path(__file__).with_name("start.py")
_SPLITS = ("train", "validation", "test", "exclude_images_of")


@dataclass(frozen=True)
class Shipment:
    """One job before it is sent."""

    submission: Submission
    arguments: list[str]
    """Of the command on the cluster."""
    made: dict[str, str]
    """Files for the job by name."""
    env: dict[str, str]
    about: dict[str, str]


def make_shipment(
    recipe: str, overrides: list[str], storage: str, verb: str, data_root: str | None, env: list[str]
) -> Shipment:
    """Read and check everything that can be checked before anything is sent.

    Args:
        recipe, overrides: as `load_recipe` takes them.
        storage: absolute path that every node of the cluster sees, or the URI of an object store.
        verb: run, train or prepare.
        data_root: folder or URI on the cluster that relative paths of the recipe lie in.
        env: names of environment variables that the job gets too.

    Raises:
        UsageError: with the field and what to do about it.
    """
    _check_storage(storage)
    loaded = load_any(recipe, overrides) if verb == "prepare" else load_recipe(recipe, overrides)
    loaded = _place(loaded, data_root)
    if isinstance(loaded, Recipe):
        image_tokens(loaded.model)
        run = run_name(loaded)
    else:
        run = data_folder(Folder(storage), loaded.data, loaded.name, loaded.tokens_per_image, loaded.seed).name
    return Shipment(
        Submission(run if verb == "run" else f"{run}-{verb}", storage.rstrip("/") or "/"),
        [verb, f"{JOB_FOLDER}/recipe.yaml", "--storage", storage],
        {"recipe.yaml": _text(loaded), "submission.json": _wanted(), "start.py": _START.read_text()},
        _environment(env),
        {"mlmamba.recipe": recipe, "mlmamba.from": f"{getpass.getuser()}@{socket.gethostname()}"},
    )


def _check_storage(storage: str) -> None:
    """Raise UsageError when the cluster's nodes cannot share it, or all could read a password in it."""
    if is_remote(storage):
        if shown(storage) != storage or secret_in(storage):
            raise UsageError(
                f"--storage {without_secrets(shown(storage))}: leave the user and password out, for a job's "
                "command can be read on the cluster's dashboard; the nodes' environment "
                "(AWS_ACCESS_KEY_ID, ...) or role should hold them"
            )
    elif not PurePosixPath(storage.removeprefix("file://")).is_absolute():
        raise UsageError(
            f"--storage {storage}: give an absolute path that every node of the cluster sees, such as a network file "
            "system, or the URI of an object store; a relative path would lie in the job's own folder, which goes with "
            "the job"
        )


def local_paths(recipe: Recipe | DataRecipe) -> Iterator[tuple[str, str]]:
    """Field and value of each path in a recipe that is a relative one of this machine's."""
    sets: list[tuple[str, DataConfig]] = [("data", recipe.data)]
    if isinstance(recipe, Recipe):
        stages = enumerate(recipe.train.stages)
        sets += [(f"train.stages.{i}.data", stage.data) for i, stage in stages if stage.data is not None]
    for place, data in sets:
        for split in _SPLITS:
            for i, source in enumerate(getattr(data, split)):
                for name in source.PATHS:
                    value = getattr(source, name)
                    for j, path in enumerate(value if isinstance(value, list) else [value]):
                        key = f"{place}.{split}.{i}.{name}" + (f".{j}" if isinstance(value, list) else "")
                        if _relative(path):
                            yield key, path
        if data.tokenizer.name and _relative_here(data.tokenizer.name):
            yield f"{place}.tokenizer.name", data.tokenizer.name
    if isinstance(recipe, Recipe):
        if _relative_here(recipe.model.text.weights):
            yield "model.text.weights", recipe.model.text.weights
        for i, tower in enumerate(recipe.model.vision.towers):
            if _relative_here(tower.weights):
                yield f"model.vision.towers.{i}.weights", tower.weights


def _place(recipe: Recipe | DataRecipe, root: str | None) -> Recipe | DataRecipe:
    """The recipe with its relative paths below `root`. Raises UsageError when it has some and there is no root."""
    found = dict(local_paths(recipe))
    if not found:
        return recipe
    if root is None:
        examples = "; ".join(f"{key}: {path}" for key, path in list(found.items())[:3])
        raise UsageError(
            f"{len(found)} paths of the recipe are relative to this folder, which the cluster does not have "
            f"({examples}). Data does not travel: give the folder where the nodes see it with --data-root DIR, "
            "or absolute paths with --set"
        )
    refuse_secrets(root, "--data-root")
    if _relative(root):
        raise UsageError(f"--data-root {root}: give an absolute path or URI, as the cluster's nodes see it")
    content = recipe.model_dump(mode="json")
    for key, path in found.items():
        node, *parents, last = content, *key.split(".")
        for part in parents:
            node = node[int(part) if isinstance(node, list) else part]
        node[int(last) if isinstance(node, list) else last] = join(root, path)
    return type(recipe).model_validate(content)


def _relative(path: str) -> bool:
    return "://" not in path and not path.startswith(("/", "~"))


def _relative_here(name: str) -> bool:
    """Whether a name that may be a hub's is a relative path of this machine's."""
    return _relative(name) and ":" not in name and Path(name).exists()


def _text(recipe: Recipe | DataRecipe) -> str:
    """The recipe with its overrides and named data sets in one file. Reading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _wanted() -> str:
    """What the job's first script looks for: the least Python, the packages with our versions, our revision."""
    try:
        own = importlib.metadata.metadata("mlmamba")
        names = [re.match(r"[\w.-]+", line)[0] for line in own.get_all("Requires-Dist", []) if "extra ==" not in line]
        python = re.search(r"[\d.]+", own["Requires-Python"] or _PYTHON)[0]
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        names, python = list(REQUIRED), _PYTHON
    packages = {name: importlib.metadata.version(name) for name in names}
    return json.dumps({"python": python, "packages": packages, "git": git_revision()}, indent=2, sort_keys=True)


def _environment(names: list[str]) -> dict[str, str]:
    """Values of the variables that the job gets. They can be read by everyone who may see the cluster's dashboard."""
    absent = [name for name in names if name not in os.environ]
    if absent:
        raise UsageError(f"--env {absent[0]}: there is no such variable in this environment")
    found = {name: os.environ[name] for name in names}
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if server and "MLFLOW_TRACKING_URI" not in found:
        if urlsplit(server).password:
            raise UsageError(
                "MLFLOW_TRACKING_URI holds a password, and a job's variables can be read on the cluster's dashboard: "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster's nodes, and unset it here"
            )
        found["MLFLOW_TRACKING_URI"] = server
    return found
