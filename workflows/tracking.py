"""MLflow: one run per workflow, found again after a restart, and metrics written by the driver alone.

Workers never touch MLflow: they report to Ray Train, and the driver logs. So there is one writer, SQLite is enough on
one machine, and a restarted workflow goes on in the same run (tag `mlmamba.workflow`).
"""

import logging
import os
import subprocess
import time
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, RunStatus
from mlflow.tracking import MlflowClient

from pipelines.manifest import Manifest
from workflows.config import Recipe
from workflows.layout import Layout

WORKFLOW_TAG = "mlmamba.workflow"
SERVER = os.environ.get("MLFLOW_TRACKING_URI")  # read once: mlflow.set_tracking_uri overwrites it


def tracking_uri(storage: Path) -> str:
    """MLFLOW_TRACKING_URI when it was set by the user, else an SQLite database in the storage folder."""
    return SERVER or f"sqlite:///{storage / 'mlflow.db'}"


def connect(storage: Path) -> MlflowClient:
    """Point MLflow at the storage folder's database (or the server in MLFLOW_TRACKING_URI)."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(tracking_uri(storage))
    if SERVER is None:  # MLflow puts it into the environment, where a child process would take it for the user's
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    return MlflowClient()


class Tracker:
    """The MLflow run of one workflow."""

    def __init__(self, storage: Path, recipe: Recipe, workflow: str):
        """Open the run of `workflow` (the run folder's name), or start it."""
        self.client = connect(storage)
        self.experiment_id = self._experiment(recipe.name, storage)
        found = self.client.search_runs(
            [self.experiment_id], filter_string=f"tags.`{WORKFLOW_TAG}` = '{workflow}'", max_results=1
        )
        if found:
            self.run_id = found[0].info.run_id
            self.client.update_run(self.run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        else:
            tags = {WORKFLOW_TAG: workflow, "mlmamba.recipe": recipe.name, "mlmamba.git": git_revision()}
            self.run_id = self.client.create_run(self.experiment_id, tags=tags, run_name=workflow).info.run_id
            self._log_parameters(recipe)

    def _experiment(self, name: str, storage: Path) -> str:
        existing = self.client.get_experiment_by_name(name)
        if existing:
            return existing.experiment_id
        location = None if SERVER else (storage / "mlflow").as_uri()
        return self.client.create_experiment(name, artifact_location=location)

    def _log_parameters(self, recipe: Recipe) -> None:
        for name, value in flatten(recipe.model_dump(mode="json")).items():
            self.client.log_param(self.run_id, name, str(value)[:6000])

    def log_data(self, manifests: dict[str, Manifest], layout: Layout) -> None:
        """Record every stage's data set, by its content digest, as an input of the run; once, however often called."""
        known = {item.dataset.digest for item in self.client.get_run(self.run_id).inputs.dataset_inputs}
        for stage, manifest in manifests.items():
            short = manifest.digest.removeprefix("sha256:")[:36]
            if short not in known:
                self._log_dataset(layout.data[stage], short)
                known.add(short)
            self.client.set_tag(self.run_id, f"mlmamba.data.{stage}", manifest.digest)

    def _log_dataset(self, location: Path, digest: str) -> None:
        dataset = MetaDataset(HTTPDatasetSource(location.as_uri()), name=location.name, digest=digest)
        with mlflow.start_run(run_id=self.run_id):
            mlflow.log_input(dataset, context="training")

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers under their names at a step."""
        now = int(time.time() * 1000)
        batch = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self.client.log_batch(self.run_id, metrics=batch)

    def log_file(self, path: Path) -> None:
        """Log one file as an artifact."""
        self.client.log_artifact(self.run_id, str(path))

    def finish(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


def flatten(content: dict | list, prefix: str = "") -> dict[str, object]:
    """Nested dicts and lists to one dict with dotted keys."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    flat: dict[str, object] = {}
    for key, value in items:
        if isinstance(value, dict | list) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def git_revision() -> str:
    """Commit of the code that runs, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
