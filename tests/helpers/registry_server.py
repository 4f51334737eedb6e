"""A registry with versions to move, on SQLite or on a real `mlflow server` process."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow.tracking import MlflowClient

from tests.helpers.processes import free_port
from workflows.recipe.evaluate import Gate

_FEW_PROCESSES = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # runners of jobs that nobody gives


@contextmanager
def mlflow_server(folder: Path, port: int | None = None, **environment: str):
    """`mlflow server` with an SQLite store and its own artifacts, one worker. Yields its URI and process."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    settings = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"} | _FEW_PROCESSES | environment
    settings.pop("MLFLOW_TRACKING_URI", None)
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=settings, start_new_session=True, cwd=folder)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
        yield f"http://127.0.0.1:{port}", process
    finally:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    """End a process and its group."""
    if process.poll() is None:
        os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def add_version(
    client: MlflowClient,
    name: str,
    source: str,
    scores: dict | None = None,
    gate: Gate | None = None,
    model_id: str | None = None,
    **tags: str,
) -> str:
    """A version with tags as `register` writes them. Returns its number."""
    if name not in [model.name for model in client.search_registered_models()]:
        client.create_registered_model(name)
    content = {"mlmamba.scores": json.dumps(scores or {}), "mlmamba.gate": (gate or Gate()).model_dump_json(), **tags}
    return str(client.create_model_version(name, source, tags=content, model_id=model_id).version)


def add_model(client: MlflowClient, name: str, folder: Path, example: Path | None = None, **options) -> str:
    """A version whose package holds a model folder, logged to a run of its own. Returns its number."""
    from workflows.registry import pyfunc

    experiment = client.get_experiment_by_name("models")
    identity = experiment.experiment_id if experiment else client.create_experiment("models")
    with mlflow.start_run(experiment_id=identity):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=pyfunc.__file__,
            artifacts={"model": str(folder)} | ({"example": str(example)} if example else {}),
            signature=pyfunc.SIGNATURE,
            pip_requirements=["mlmamba"],
        )
    return add_version(client, name, info.model_uri, model_id=info.model_id, **options)
