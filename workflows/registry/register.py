"""Registering a finished model: its folder, what made it, what it scored, and one question to check it by."""

import importlib.metadata
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlflow
import yaml
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

import mlmamba
from pipelines.identity import digest
from pipelines.manifest import Manifest
from workflows.errors import WorkflowError
from workflows.recipe.schema import Recipe
from workflows.registry.history import UnreadableTag, read_tag
from workflows.registry.models import versions_of
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout
from workflows.tracking.tracker import Tracker, git_revision


@dataclass(frozen=True)
class Example:
    """One question about one image. Serving asks it before it takes a version."""

    image: bytes
    """Encoded."""
    question: str
    answer: str
    max_tokens: int
    """Longest answer that the evaluation allowed."""

    def save(self, folder: Path) -> None:
        """Write it to a new folder."""
        folder.mkdir(parents=True)
        (folder / _IMAGE).write_bytes(self.image)
        content = {"question": self.question, "answer": self.answer, "max_tokens": self.max_tokens}
        (folder / _FILE).write_text(json.dumps(content, indent=2))

    @classmethod
    def load(cls, folder: Path) -> "Example":
        """What `save` wrote. Raises OSError, ValueError, TypeError or KeyError."""
        content = json.loads((folder / _FILE).read_text())
        earlier = folder / "picture"  # its name in versions registered by mlmamba 0.1
        image = (earlier if earlier.exists() else folder / _IMAGE).read_bytes()
        return cls(image, str(content["question"]), str(content["answer"]), int(content["max_tokens"]))


os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # results go there, in JSON perhaps

RECIPE_FILE = "recipe.yaml"


def register(
    tracker: Tracker,
    recipe: Recipe,
    layout: Layout,
    model: Path,
    data_digest: str,
    scores: dict[str, float],
    example: Example | None = None,
) -> str:
    """Log the model folder to the run and register it as a new version. Returns the version.

    Called again for the same model it returns the version of the first call, whose scores and gate become those given
    now: both may change without training again.

    Args:
        layout: where the recipe's data lies.
        model: folder of a finished stage.
        data_digest: of all the data it was trained on.
        scores: by name.
        example: stored with the model.

    Raises:
        WorkflowError: the registry refused.
    """
    client, name = tracker.client, recipe.register_as.name
    key = json.loads((model / "stage.json").read_text())["digest"]
    judged = {
        "mlmamba.gate": recipe.evaluate.gate.model_dump_json(),
        "mlmamba.evaluation": digest(recipe.data.model_dump(mode="json")["test"]),
    }
    client.log_text(tracker.run_id, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), RECIPE_FILE)
    for version in versions_of(client, name):
        if version.tags.get("mlmamba.model") == key:
            try:  # `mlmamba evaluate` may have added some
                known = read_tag(version.tags, "mlmamba.scores", dict[str, float], {})
            except UnreadableTag:
                known = {}
            for tag, value in {**judged, "mlmamba.scores": json.dumps(known | scores)}.items():
                client.set_model_version_tag(name, str(version.version), tag, value)
            return str(version.version)
    run = client.get_run(tracker.run_id).data.tags
    made = {
        "mlmamba.model": key,
        "mlmamba.recipe": recipe.name,
        "mlmamba.git": run.get("mlmamba.git") or git_revision(),
        "mlmamba.data_digest": data_digest,
        "mlmamba.scores": json.dumps(scores),
        "mlmamba.data": json.dumps(describe_data(layout.data)),
    }
    try:
        return str(_create(tracker, name, model, example, made | judged).version)
    except MlflowException as error:
        raise WorkflowError(f"{name} could not be registered: {error}") from error


def describe_data(folders: dict[str, Folder]) -> list[dict]:
    """The data sets of a training, from their manifests: folder, digest, rows, tokens, shards, and who trained on it.

    Args:
        folders: data set by stage.
    """
    described = []
    for folder in dict.fromkeys(folders.values()):
        manifest = Manifest.load(folder.uri)
        train = manifest.splits["train"]
        described.append(
            {
                "name": folder.name,
                "folder": folder.shown,
                "digest": manifest.digest,
                "stages": [stage for stage, used in folders.items() if used == folder],
                "rows": train.rows,
                "tokens": train.tokens,
                "shards": len(train.shards),
            }
        )
    return described


# What pyfunc.py and the package mlmamba import beside the standard library (tests/unit/registry/test_pyfunc.py).
NEEDED = (
    *("torch", "torchvision", "timm", "transformers", "tokenizers", "safetensors", "huggingface-hub"),
    *("filelock", "jinja2", "pillow", "numpy", "pandas"),
)


def carried() -> dict[str, list[str]]:
    """What a version carries to be loaded where there is no checkout and no index that has mlmamba: the source of the
    package mlmamba, and the versions of what it needs. Options of MLflow's `log_model` and `save_model`."""
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in NEEDED}  # torch 2.15.0+cpu
    return {
        "code_paths": [str(Path(mlmamba.__file__).parent)],
        "pip_requirements": [f"{name}=={version}" for name, version in versions.items()],
    }


def _create(tracker: Tracker, name: str, model: Path, example: Example | None, tags: dict[str, str]) -> ModelVersion:
    from workflows.registry import pyfunc  # it imports torch, which nothing else here needs

    client = tracker.client
    with tempfile.TemporaryDirectory() as temporary:
        artifacts = {"model": str(model)}
        if example is not None:
            example.save(Path(temporary) / "example")
            artifacts["example"] = str(Path(temporary) / "example")
        with mlflow.start_run(run_id=tracker.run_id):
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=pyfunc.__file__,
                artifacts=artifacts,
                signature=pyfunc.SIGNATURE,
                model_config=pyfunc.OPTIONS,
                **carried(),
            )
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # The tags go with the version, so that a kill cannot leave one that says nothing. A server wants the model's id.
    return client.create_model_version(name, info.model_uri, tracker.run_id, tags, model_id=info.model_id)


_FILE, _IMAGE = "example.json", "image"
