"""One MLflow run per workflow, against SQLite and a real server process that goes away and comes back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import requests
import yaml
from mlflow.tracking import MlflowClient

from pipelines.manifest import Manifest
from tests.helpers.processes import free_port
from tests.helpers.toy_workflow import recipe
from workflows.errors import WorkflowError
from workflows.recipe.schema import Recipe
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout
from workflows.tracking import tracker as tracking
from workflows.tracking.tracker import Tracker, git_revision


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(tracking, "_DRAIN_SECONDS", 60.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


class Server:
    """`mlflow server` on a port of this machine."""

    def __init__(self, folder):
        self.port = free_port()
        self.uri, self._folder = f"http://127.0.0.1:{self.port}", folder

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "server.log").open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            try:
                if requests.get(f"{self.uri}/health", timeout=2).ok:
                    return
            except requests.exceptions.RequestException:
                time.sleep(0.3)
        raise TimeoutError("the MLflow server did not start")

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def content(tmp_path) -> Recipe:
    return Recipe.model_validate(recipe(tmp_path))


@pytest.fixture
def opened(content, tmp_path):
    """Open the run of the workflow `tiny-1` and collect its notes."""
    (tmp_path / "run").mkdir()
    notes = []

    def open_run() -> tuple[Tracker, list[str]]:
        return Tracker(tmp_path, content, "tiny-1", tmp_path / "run", notes.append), notes

    return open_run


def test_a_restarted_workflow_goes_on_in_its_run_without_repeating_steps(opened, tmp_path):
    first, _ = opened()
    for step in (4, 8, 12):
        first.log_metrics({"train/loss": 1 / step, "train/worker_peak_memory_gib": 2.0}, step)
    first.log_samples("full", 8, [{"question": "What colour is it?", "answer": "red", "prediction": "blue"}])
    first.finish("KILLED")
    assert first.client.get_run(first.run_id).info.status == "KILLED"

    second, _ = opened()  # went on from the checkpoint of step 4
    assert second.run_id == first.run_id
    assert second.client.get_run(first.run_id).info.status == "RUNNING"
    for step in (8, 12, 16):
        second.log_metrics({"train/loss": 1 / step, "train/worker_peak_memory_gib": 2.0}, step)
    second.log_samples("full", 8, [{"question": "What colour is it?", "answer": "red", "prediction": "blue"}])
    second.log_samples("full", 16, [{"question": "What colour is it?", "answer": "red", "prediction": "red"}])
    second.finish("FINISHED")
    client, run_id = second.client, second.run_id
    history = client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(step, 1 / step) for step in (4, 8, 12, 16)]
    table = client.download_artifacts(run_id, "samples.json", str(tmp_path))
    rows = pd.read_json(table, orient="split")
    assert rows[["stage", "step", "prediction"]].values.tolist() == [["full", 8, "blue"], ["full", 16, "red"]]
    experiment = client.get_experiment_by_name("tiny").experiment_id
    assert len(client.search_runs([experiment])) == 1


def test_a_run_has_the_recipe_its_parameters_and_the_revision(opened, content, tmp_path):
    tracker, _ = opened()
    tracker.finish("FINISHED")
    run = tracker.client.get_run(tracker.run_id)
    assert run.data.params["train.stages.1.learning_rate"] == "0.003"
    assert run.data.tags["mlmamba.git"] == git_revision()
    file = tracker.client.download_artifacts(tracker.run_id, "recipe.yaml", str(tmp_path))
    assert Recipe.model_validate(yaml.safe_load(Path(file).read_text())) == content


def test_data_is_an_input_of_the_run_once_and_leaves_it_running(opened, tmp_path):
    folder = tmp_path / "data" / "tiny-0"
    folder.mkdir(parents=True)
    manifest = Manifest(
        digest="d" * 64, tokenizer_digest="", recipe_digest="", sources={}, max_tokens=8, tokens_per_image=1, splits={}
    )
    manifest.save(str(folder))
    layout = Layout(Folder(tmp_path), {"connector": Folder(folder), "full": Folder(folder)}, Folder(tmp_path / "run"))
    tracker, _ = opened()
    for _ in range(2):
        tracker.log_data({"connector": manifest, "full": manifest}, layout)
    run = tracker.client.get_run(tracker.run_id)
    assert [item.dataset.digest for item in run.inputs.dataset_inputs] == ["d" * 36]
    assert run.inputs.dataset_inputs[0].tags[0].value == "training"
    assert run.info.status == "RUNNING"  # mlflow.start_run as a context would have ended it
    tracker.finish("FINISHED")
    assert tracker.client.list_artifacts(tracker.run_id, "data/tiny-0")[0].path == "data/tiny-0/manifest.json"


@pytest.mark.slow
def test_training_goes_on_while_the_server_is_away(content, tmp_path, monkeypatch):
    server = Server(tmp_path)
    monkeypatch.setattr(tracking, "SERVER", server.uri)
    (tmp_path / "run").mkdir()
    notes = []
    try:
        server.start()
        tracker = Tracker(tmp_path, content, "tiny-1", tmp_path / "run", notes.append)
        tracker.log_metrics({"train/loss": 1.0}, 1)
        assert tracker._journal.drain(60)
        server.stop()
        start = time.monotonic()
        for step in range(2, 102):
            tracker.log_metrics({"train/loss": 1 / step}, step)
        tracker.set_tag("mlmamba.stage.full", "said while the server was away")
        assert time.monotonic() - start < 3  # a single call to the absent server would take as long
        deadline = time.monotonic() + 60
        while not notes and time.monotonic() < deadline:
            time.sleep(0.1)
        server.start()
        tracker.finish("FINISHED")
        client = MlflowClient(server.uri)
        assert [m.step for m in client.get_metric_history(tracker.run_id, "train/loss")] == list(range(1, 102))
        run = client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlmamba.stage.full"] == "said while the server was away"
        assert "training goes on" in notes[0]
        assert notes[1:] == ["MLflow answers again"]
    finally:
        server.stop()


def test_no_server_at_the_start_is_told_at_once(content, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "SERVER", "http://user:secret@127.0.0.1:9")
    (tmp_path / "run").mkdir()
    with pytest.raises(WorkflowError, match=r"the MLflow server in MLFLOW_TRACKING_URI \(http://127") as error:
        Tracker(tmp_path, content, "tiny-1", tmp_path / "run", print)
    assert "secret" not in str(error.value)
