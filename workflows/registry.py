"""The MLflow model registry: versions with their lineage, and the alias that serving follows.

A registered version is an MLflow pyfunc model whose artifact `model` is the model folder. Tags on the version say which
data, recipe and code made it; the alias `champion` moves by `promote`, and the tag `mlmamba.previous_version` on the
version lets `rollback` find the one before.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from workflows.config import Recipe
from workflows.errors import WorkflowError
from workflows.pyfunc_model import SIGNATURE
from workflows.tracking import Tracker, connect

PREFIX = "models:/"


@dataclass(frozen=True)
class ResolvedModel:
    """A model folder on this machine, and where it came from."""

    folder: Path
    name: str | None = None
    version: str | None = None
    run_id: str | None = None

    @property
    def label(self) -> str:
        """What a person calls it: name/version, or the folder."""
        return f"{self.name}/{self.version}" if self.name else self.folder.name


def resolve_model(reference: str, storage: Path) -> ResolvedModel:
    """Find a model by folder or by models:/name@alias (or models:/name/version) and bring its folder here.

    Raises:
        WorkflowError: there is no such folder, model, version or alias.
    """
    if not reference.startswith(PREFIX):
        folder = Path(reference)
        if not (folder / "config.json").is_file():
            raise WorkflowError(f"{reference} is neither a model folder (no config.json) nor models:/NAME@ALIAS")
        return ResolvedModel(folder)
    version = get_version(connect(storage), reference)
    package = Path(mlflow.artifacts.download_artifacts(f"{PREFIX}{version.name}/{version.version}"))
    inside = Model.load(package).flavors["python_function"]["artifacts"]["model"]["path"]
    return ResolvedModel(package / inside, version.name, str(version.version), version.run_id)


def get_version(client: MlflowClient, reference: str):
    """The MLflow model version of models:/name@alias or models:/name/version. Raises WorkflowError."""
    body = reference.removeprefix(PREFIX)
    name, at, alias = body.partition("@")
    try:
        if at:
            return client.get_model_version_by_alias(name, alias)
        name, _, version = body.partition("/")
        return client.get_model_version(name, version)
    except MlflowException as error:
        known = [model.name for model in client.search_registered_models()]
        raise WorkflowError(
            f"there is no model {reference} in the registry at {mlflow.get_tracking_uri()}; "
            f"registered: {', '.join(known) or 'none'}. `mlmamba models list` shows aliases"
        ) from error


def register(tracker: Tracker, recipe: Recipe, model: Path, data_digest: str, scores: dict) -> str:
    """Log the model folder to the run and register it as a new version. Returns the version.

    Called twice for one folder it returns the version of the first call.
    """
    client, name = tracker.client, recipe.register_as.name
    key = json.loads((model / "stage.json").read_text())["digest"]
    for version in _versions(client, name):
        if version.tags.get("mlmamba.model") == key:
            return str(version.version)
    with mlflow.start_run(run_id=tracker.run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"model": str(model)},
            signature=SIGNATURE,
            pip_requirements=["mlmamba"],
        )
    if not _exists(client, name):
        client.create_registered_model(name)
    version = client.create_model_version(name, source=info.model_uri, run_id=tracker.run_id)
    tags = {
        "mlmamba.model": key,
        "mlmamba.recipe": recipe.name,
        "mlmamba.data_digest": data_digest,
        "mlmamba.scores": json.dumps(scores),
    }
    for tag, value in tags.items():
        client.set_model_version_tag(name, version.version, tag, value)
    return str(version.version)


def promote(client: MlflowClient, name: str, version: str, alias: str) -> None:
    """Move the alias to a version, remembering the version that held it."""
    previous = champion(client, name, alias)
    if previous == version:
        return
    if previous is not None:
        client.set_model_version_tag(name, version, f"mlmamba.previous.{alias}", previous)
    client.set_registered_model_alias(name, alias, version)


def champion(client: MlflowClient, name: str, alias: str) -> str | None:
    """Version that the alias names, or None."""
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException:
        return None


def gate_failures(gate: dict[str, float], scores: dict[str, float]) -> list[str]:
    """What keeps a model from promotion: one line for each score under its threshold or missing."""
    failures = []
    for name, least in gate.items():
        value = scores.get(name)
        if value is None:
            failures.append(f"{name} was not measured, {least:.1%} is wanted")
        elif value < least:
            failures.append(f"{name} is {value:.1%}, {least:.1%} is wanted")
    return failures


def list_models(client: MlflowClient) -> list[dict]:
    """Every registered version: name, version, aliases, scores and run."""
    rows = []
    for model in client.search_registered_models():
        aliases: dict[str, list[str]] = {}
        for alias, version in client.get_registered_model(model.name).aliases.items():
            aliases.setdefault(str(version), []).append(alias)
        for version in _versions(client, model.name):
            rows.append(
                {
                    "name": model.name,
                    "version": str(version.version),
                    "aliases": aliases.get(str(version.version), []),
                    "scores": json.loads(version.tags.get("mlmamba.scores", "{}")),
                    "data_digest": version.tags.get("mlmamba.data_digest"),
                    "recipe": version.tags.get("mlmamba.recipe"),
                    "run_id": version.run_id,
                }
            )
    return rows


def _versions(client: MlflowClient, name: str) -> list:
    found = client.search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version))


def _exists(client: MlflowClient, name: str) -> bool:
    try:
        client.get_registered_model(name)
    except MlflowException:
        return False
    return True
