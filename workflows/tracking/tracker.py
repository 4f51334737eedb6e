"""MLflow: one run per workflow, found again after a restart, and metrics written by the driver alone.

Workers never touch MLflow: they report to Ray Train, and the driver logs. So there is one writer, SQLite is enough on
one machine, and a restarted workflow goes on in the same run (tag `mlmamba.workflow`). What comes during training goes
through a journal (workflows/tracking/journal.py), so that the server may be slow or away; opening the run at the
start and registering the model at the end need it.

MLflow refuses a metric's or parameter's name with other characters than letters and digits of any script, "_", "-",
".", ":", " " and "/", one that would be another name as a path ("", "a//b", "./a", "..a", "a/"), and one of over 250
characters. Names made of a user's words ("what is it?", "Farbe (rot)") hold such characters. So each of them becomes
`_xHEX_`, its code point in hexadecimal capitals, as in Office Open XML: "what is it?" is "what is it_x3F_". A "_" of
the text that begins such a sequence becomes `_x5F_` itself, so that two texts never have the same name, and
`text_of` gives the text of a name. The name of no text at all is `_x00_`. A name that would be too long is cut and ends
in a digest of the whole: it is the only kind that cannot be read back.
"""

import hashlib
import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # 7 would take four minutes to say that nobody is there
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import mlflow
import yaml
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, LifecycleStage, Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH

from pipelines.manifest import MANIFEST_FILE, Manifest
from pipelines.storage import shown
from workflows.errors import UsageError, WorkflowError
from workflows.recipe.schema import Recipe
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout
from workflows.tracking.journal import Journal, Refused, short_reason

WORKFLOW_TAG = "mlmamba.workflow"
SAMPLES = "samples.json"
"""Artifact with the answers during training, a table in MLflow's pages."""
_DRAIN_SECONDS = 30.0
"""Seconds that a workflow's end waits for the server."""
SERVER = os.environ.get("MLFLOW_TRACKING_URI")  # read once: mlflow.set_tracking_uri overwrites it


def tracking_uri(storage: Path) -> str:
    """MLFLOW_TRACKING_URI when it was set by the user, else an SQLite database in the storage folder."""
    return SERVER or f"sqlite:///{storage / 'mlflow.db'}"


def check_registry(storage: Folder) -> None:
    """Raise UsageError when the database would have to lie in an object store."""
    if SERVER is None and storage.remote:
        raise UsageError(
            f"--storage {storage}: an object store cannot hold MLflow's database; name an MLflow server in "
            "MLFLOW_TRACKING_URI, or choose a folder"
        )


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

    def __init__(self, storage: Path, recipe: Recipe, workflow: str, folder: Path, note: Callable[[str], None]):
        """Open the run of `workflow`, or start it.

        Args:
            storage: holds the database where there is no server.
            workflow: name of the run folder.
            folder: the run folder, for the journal.
            note: told when the server goes away during training.

        Raises:
            WorkflowError: there is no such server or database.
        """
        try:
            self.client = connect(storage)
            self.run_id = self._open(storage, recipe, workflow)
        except (MlflowException, OSError) as error:
            raise WorkflowError(f"{_unreachable(storage)}: {short_reason(error)}") from error
        self._note = note
        self._journal = Journal(folder, self.run_id, self._send, note)
        self._logged: dict[str, int] = {}
        for entry in self._journal.entries:
            for name in entry.get("metrics", ()):
                self._logged[name] = max(entry["step"], self._logged.get(name, 0))

    def _open(self, storage: Path, recipe: Recipe, workflow: str) -> str:
        experiment = self._experiment(recipe.experiment or recipe.name, storage)
        found = self.client.search_runs(
            [experiment],
            filter_string=f"tags.`{WORKFLOW_TAG}` = '{workflow}'",
            max_results=1,
            order_by=["attributes.start_time ASC"],
        )
        if found:
            run = found[0]
            self.client.update_run(run.info.run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        else:
            tags = {WORKFLOW_TAG: workflow, "mlmamba.recipe": recipe.name, "mlmamba.git": git_revision()}
            run = self.client.create_run(experiment, tags=tags, run_name=workflow)
        if not run.data.params:  # also of a run whose process was killed between the two
            self._log_recipe(run.info.run_id, recipe)
        return run.info.run_id

    def _experiment(self, name: str, storage: Path) -> str:
        existing = self.client.get_experiment_by_name(name)
        if existing and existing.lifecycle_stage != LifecycleStage.ACTIVE:
            raise WorkflowError(
                f"the MLflow experiment {name!r} was deleted; restore it (mlflow experiments restore --experiment-id "
                f"{existing.experiment_id}) or name another in the recipe's `experiment`"
            )
        if existing:
            return existing.experiment_id
        location = None if SERVER else (storage / "mlflow").as_uri()
        return self.client.create_experiment(name, artifact_location=location)

    def _log_recipe(self, run_id: str, recipe: Recipe) -> None:
        content = recipe.model_dump(mode="json")
        self.client.log_text(run_id, yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "recipe.yaml")
        params = [Param(metric_name(name), str(value)[:6000]) for name, value in flatten(content).items()]
        for i in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[i : i + 100])

    def log_data(self, manifests: dict[str, Manifest], layout: Layout) -> None:
        """Record every stage's data set as an input of the run, by its content digest, and its manifest; once."""
        known = {item.dataset.digest for item in self.client.get_run(self.run_id).inputs.dataset_inputs}
        for stage, manifest in manifests.items():
            short, folder = manifest.digest.removeprefix("sha256:")[:36], layout.data[stage]
            if short not in known:
                where = folder.shown if folder.remote else folder.local.as_uri()
                dataset = MetaDataset(HTTPDatasetSource(where), name=folder.name, digest=short)
                context = [InputTag("mlflow.data.context", "training")]
                self.client.log_inputs(self.run_id, datasets=[DatasetInput(dataset._to_mlflow_entity(), context)])
                self.log_file(folder.local / MANIFEST_FILE, f"data/{folder.name}")
                known.add(short)
            self.set_tag(f"mlmamba.data.{stage}", manifest.digest)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers by name at a step. What a name has had, but at step 0, was done again and is left out.

        A name that MLflow would refuse is written as names.py says.
        """
        named = metric_names(metrics)
        fresh = {name: float(value) for name, value in named.items() if not 0 < step <= self._logged.get(name, 0)}
        if fresh:
            self._logged |= dict.fromkeys(fresh, step)
            self._journal.add({"metrics": fresh, "step": step, "time": int(time.time() * 1000)})

    def log_samples(self, stage: str, step: int, rows: list[dict]) -> None:
        """Log answers during training as rows of the table samples.json; a step that is there is left out."""
        if all(entry.get("samples") is None or entry["step"] != step for entry in self._journal.entries):
            self._journal.add({"samples": rows, "stage": stage, "step": step})

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Log one file as an artifact, in a folder of the run's."""
        self._journal.add({"file": str(path), "folder": folder})

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self._journal.add({"tag": name, "value": value})

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log values by name, beside the recipe's; a name keeps the value that it has first."""
        self._journal.add({"params": {metric_name(name): str(value) for name, value in params.items()}})

    def finish(self, status: str) -> None:
        """Send what is left and close the run as FINISHED, FAILED or KILLED."""
        if not self._journal.close(_DRAIN_SECONDS):
            self._note(
                f"MLflow did not take {self._journal.unsent} entries; they are in the run folder, and the same command "
                "sends them when it runs again"
            )
            return
        try:
            self.client.set_terminated(self.run_id, status)
        except (MlflowException, OSError) as error:
            self._note(f"MLflow does not answer, the run stays open there: {short_reason(error)}")

    def _send(self, entries: list[dict]) -> None:
        """Send entries of the journal; neighbouring metrics go together."""
        try:
            points = [
                Metric(name, value, entry["time"], entry["step"])
                for entry in entries
                for name, value in entry.get("metrics", {}).items()
            ]
            for i in range(0, len(points), 500):
                self.client.log_batch(self.run_id, metrics=points[i : i + 500])
            tags = [RunTag(entry["tag"], entry["value"][:5000]) for entry in entries if "tag" in entry]
            if tags:
                self.client.log_batch(self.run_id, tags=tags)
            for entry in entries:
                if "params" in entry:
                    params = [Param(name, value) for name, value in entry["params"].items()]
                    self.client.log_batch(self.run_id, params=params)
                if "file" in entry and Path(entry["file"]).exists():
                    self.client.log_artifact(self.run_id, entry["file"], entry["folder"])
            if any("samples" in entry for entry in entries):
                self._send_samples()
        except MlflowException as error:
            if error.error_code in (ErrorCode.Name(INVALID_PARAMETER_VALUE), ErrorCode.Name(RESOURCE_DOES_NOT_EXIST)):
                raise Refused(short_reason(error)) from error
            raise

    def _send_samples(self) -> None:
        """The whole table, so that sending it again is no harm."""
        rows = [
            {"stage": entry["stage"], "step": entry["step"], **row}
            for entry in list(self._journal.entries)
            for row in entry.get("samples") or ()
        ]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}
        self.client.log_dict(self.run_id, table, SAMPLES)
        self.client.set_tag(self.run_id, "mlflow.loggedArtifacts", json.dumps([{"path": SAMPLES, "type": "table"}]))


def _unreachable(storage: Path) -> str:
    if SERVER:
        return f"the MLflow server in MLFLOW_TRACKING_URI ({shown(SERVER)}) does not answer; start it, or unset this"
    return f"cannot open the tracking database {storage / 'mlflow.db'}"


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
    """Commit of the code that runs, with "+changes" where files differ from it; of a submitted job, the client's.

    "unknown" outside a checkout.
    """
    if sent := os.environ.get("MLMAMBA_GIT"):
        return sent
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = _say([*git, "rev-parse", "HEAD"])
        return commit + ("+changes" if _say([*git, "status", "--porcelain", "--untracked-files=no"]) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _say(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


_REFUSED = re.compile(r"[^/\w.\- :]")
_LIKE_OURS = re.compile(r"_(?=x[0-9A-F])")
_EMPTY_SEGMENT = re.compile(r"(?<=/)/|^/|/$")
_DOTS = re.compile(r"(?:(?<=/)|^)\.{1,2}(?=/|$)|^\.\.")
_OURS = re.compile(r"_x([0-9A-F]+)_")
_EMPTY = "_x00_"  # a code point is written without zeros before it, so this one is free
_DIGEST = 16


def metric_name(text: str) -> str:
    """The name of a metric or parameter for a text; most texts are their own name (see the top of this file)."""
    name = _LIKE_OURS.sub(_escaped, text)
    for refused in (_REFUSED, _EMPTY_SEGMENT, _DOTS):
        name = refused.sub(_escaped, name)
    if len(name) > MAX_ENTITY_KEY_LENGTH:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
        name = f"{name[: MAX_ENTITY_KEY_LENGTH - _DIGEST - 1]}_{digest}"
    return name or _EMPTY


def metric_names(numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers by the names that MLflow takes for them."""
    return {metric_name(text): value for text, value in numbers.items()}


def text_of(name: str) -> str:
    """The text that a name was made of; of a name that was cut, what is left of it and the digest."""
    return "" if name == _EMPTY else _OURS.sub(lambda found: chr(int(found[1], 16)), name)


def _escaped(found: re.Match) -> str:
    return "".join(f"_x{ord(character):X}_" for character in found[0])
