"""The registry on a real `mlflow server` process with one worker: the command line, models that are downloaded, serving
that outlives the server, and the webhook that the server sends."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import pytest
import torch
import uvicorn
from mlflow.entities.webhook import WebhookAction, WebhookEntity, WebhookEvent
from PIL import Image

from tests.helpers.processes import free_port, wait_for
from tests.helpers.registry_server import add_model, mlflow_server, stop
from tests.helpers.swap_models import answer_of, drawn_example, write_model, write_spoiled
from workflows.registry import get_version, holder, promote, resolve_model, rollback
from workflows.registry.models import RegistryUnreachable
from workflows.registry.register import Example
from workflows.serve.alias import Follower
from workflows.serve.http import build_app
from workflows.serve.options import Limits
from workflows.serve.service import Service
from workflows.serve.swap import SwapOptions
from workflows.serve.webhook import SECRET_VARIABLE, add_routes
from workflows.tracking import tracker as tracking

NAME, SECRET = "shapes", "a secret of this test"
# MLflow's server sends to public addresses over HTTPS alone, and remembers for a minute which webhooks there are.
ENVIRONMENT = {
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
    "MLFLOW_WEBHOOK_CACHE_TTL": "0",
}
LIMITS = Limits(max_batch=4)
PATIENCE = 180  # seconds for a change to reach a follower


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    first = write_model(root / "1", 1)
    return {"1": first, "2": write_model(root / "2", 2), "3": write_spoiled(root / "3", first, "cut")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("server"), free_port()


@pytest.fixture(scope="module")
def server(place):
    folder, port = place
    with mlflow_server(folder, port, **ENVIRONMENT) as (uri, process):
        before, tracking.SERVER = tracking.SERVER, uri
        yield uri, process
        tracking.SERVER = before
        mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def client(server, folders, tmp_path_factory):
    """Versions 1 and 2, and 3 whose weights are cut short; 1 comes with a stored example, and is champion."""
    storage = tmp_path_factory.mktemp("client")
    client = tracking.connect(storage)
    asked = drawn_example("")
    answer = answer_of(folders["1"], asked.question, asked.image, asked.max_tokens)
    drawn_example(answer).save(storage / "example")
    add_model(client, NAME, folders["1"], storage / "example", scores={"overall": 0.8})
    add_model(client, NAME, folders["2"])
    add_model(client, NAME, folders["3"])
    client.set_registered_model_alias(NAME, "champion", "1")
    return client


def command(uri, *arguments):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_promotes_and_rolls_back_on_a_server(server, client, tmp_path):
    uri, _ = server
    models = ("workflows.cli", "models")
    done = json.loads(command(uri, *models, "promote", f"{NAME}/2", "--json", "--storage", str(tmp_path)))
    assert (done["moved"], done["previous"]) == (True, "1")
    assert holder(client, NAME, "champion") == "2"
    assert rollback(client, NAME).version == "1"
    assert not (tmp_path / "mlflow.db").exists()


PREDICT = """
import sys, mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/shapes@champion")
frame = pd.DataFrame({"image": [open(sys.argv[1], "rb").read(), None], "question": sys.argv[2:4]})
frame = pd.concat([frame] * 17)  # more rows than are answered together
print("\\n".join(repr(answer) for answer in model.predict(frame)))
"""


@pytest.mark.slow
def test_pyfunc_predicts_on_images_and_questions_in_a_fresh_process(server, client, folders, tmp_path):
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    (tmp_path / "image.png").write_bytes(buffer.getvalue())
    questions = ["what is shown?", "say something"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server[0], "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, str(tmp_path / "image.png"), *questions],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    expected = [
        answer_of(folders["1"], questions[0], buffer.getvalue(), 64),
        answer_of(folders["1"], questions[1], None, 64),
    ]
    assert done.stdout.splitlines()[-34:] == [repr(answer) for answer in expected] * 17


def test_a_model_is_downloaded_once_whole_and_only_a_few_are_kept(client, folders, tmp_path):
    first = resolve_model(f"models:/{NAME}@champion", tmp_path)
    assert first.folder.is_relative_to(tmp_path / "models")
    weights = first.folder / "model.safetensors"
    assert weights.read_bytes() == (folders["1"] / "model.safetensors").read_bytes()
    asked = Example.load(first.example)
    assert asked.answer == answer_of(folders["1"], asked.question, asked.image, asked.max_tokens)
    stamp = weights.stat().st_mtime_ns
    assert resolve_model(f"models:/{NAME}/1", tmp_path) == first
    assert weights.stat().st_mtime_ns == stamp
    old = [tmp_path / "models" / f"{NAME}-{90 + i}-0123456789" for i in range(4)]
    for i, folder in enumerate(old):
        folder.mkdir()
        os.utime(folder, (i + 1, i + 1))
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / f"{NAME}@champion.json").write_text(json.dumps({"folder": str(old[0])}))
    resolve_model(f"models:/{NAME}/2", tmp_path)
    left = sorted(folder.name for folder in (tmp_path / "models").iterdir() if not folder.name.startswith("."))
    assert {old[0].name, old[3].name} <= set(left)  # one is noted as served, one among the last three
    assert len(left) == 4


@pytest.fixture
def follow(client, tmp_path):
    """Starts followers of the champion and stops them."""
    started = []

    def start(**options):
        service = Service(LIMITS)
        options = SwapOptions(**{"poll_seconds": 0.2, "retry_seconds": 1000} | options)
        follower = Follower(f"models:/{NAME}@champion", tmp_path, service, options, LIMITS, 1)
        started.append((follower, service))
        return follower, service

    yield start
    for follower, service in started:
        follower.close()
        service.served.engine.close()


def test_the_webhook_is_believed_only_with_its_signature(client, follow):
    """The server's webhook makes a follower look that would look in an hour; without the secret nothing happens."""
    follower, service = follow(poll_seconds=3600)
    assert service.served.source.version == "1"
    wait_for(lambda: follower.watcher.last_answer, PATIENCE)
    app = build_app(service)
    add_routes(app, follower, {SECRET_VARIABLE: SECRET})
    port = free_port()
    web = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=web.run)
    thread.start()
    try:
        wait_for(lambda: web.started, PATIENCE)
        event = WebhookEvent(WebhookEntity.MODEL_VERSION_ALIAS, WebhookAction.CREATED)
        hook = client.create_webhook("serving", f"http://127.0.0.1:{port}/webhooks/mlflow", [event], secret="wrong")
        assert client.test_webhook(hook.webhook_id, event).response_status == 401
        client.update_webhook(hook.webhook_id, secret=SECRET)
        assert client.test_webhook(hook.webhook_id, event).response_status == 200
        promote(client, NAME, "2")
        wait_for(lambda: service.served.source.version == "2", PATIENCE)
        rollback(client, NAME)
        wait_for(lambda: service.served.source.version == "1", PATIENCE)
        client.delete_webhook(hook.webhook_id)
    finally:
        web.should_exit = True
        thread.join()


def test_serving_outlives_the_server_and_starts_without_it(server, client, follow, place, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    _, process = server
    follower, service = follow()
    assert service.served.source.label == f"{NAME}/1"
    stop(process)
    wait_for(lambda: follower.watcher.failures, PATIENCE)
    with pytest.raises(RegistryUnreachable, match="does not answer"):
        promote(client, NAME, "2")
    assert service.ready
    _, second = follow()  # a replica that is started meanwhile
    assert second.served.source.label == f"{NAME}/1"
    folder, port = place
    with mlflow_server(folder, port, **ENVIRONMENT):
        promote(client, NAME, "2")
        wait_for(lambda: {s.served.source.version for s in (service, second)} == {"2"}, PATIENCE)
        wait_for(lambda: not follower.watcher.failures, PATIENCE)
        refused_versions_are_kept_out(client, follow, follower, service)


def refused_versions_are_kept_out(client, follow, follower, service):
    """While the champion cannot be loaded, the old one stays, and a new replica starts with it."""
    promote(client, NAME, "3")
    wait_for(lambda: follower.as_dict()["refused"], PATIENCE)
    third, newcomer = follow()
    for state in (follower.as_dict(), third.as_dict()):
        assert (state["serving"], state["refused"]["version"]) == (f"{NAME}/2", "3")
    assert newcomer.served.source.label == f"{NAME}/2"
    record = json.loads(get_version(client, f"{NAME}/3").tags["mlmamba.refused"])
    assert "SafetensorError" in record["why"]
    rollback(client, NAME)
    wait_for(lambda: follower.as_dict()["refused"] is None, PATIENCE)
