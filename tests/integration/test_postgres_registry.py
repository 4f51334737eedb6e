"""MLflow's server as cluster/ deploys it: on a real PostgreSQL and a real object store, both started here. Models are
registered, promoted by alias and loaded by alias through it; the program that starts it is the one in the image."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
import torch

from tests.helpers.manifests import CLUSTER
from tests.helpers.postgres import mlflow_on, programs, running_postgres
from tests.helpers.registry_server import add_model
from tests.helpers.s3 import running_s3
from tests.helpers.swap_models import write_model
from workflows.errors import WorkflowError
from workflows.registry import holder, promote, resolve_model, rollback
from workflows.tracking import tracker as tracking

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed (Debian's package postgresql)"),
]
NAME = "shapes"


@pytest.fixture(scope="module")
def stores():
    with running_postgres() as postgres, running_s3() as s3:
        yield postgres, s3


@pytest.fixture(scope="module")
def server(stores, tmp_path_factory):
    with mlflow_on(*stores, tmp_path_factory.mktemp("server")) as uri:
        before, tracking.SERVER = tracking.SERVER, uri
        yield uri
        tracking.SERVER = before
        mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {number: write_model(root / str(number), number) for number in (1, 2)}


@pytest.fixture(scope="module")
def client(server, folders, tmp_path_factory):
    """Two versions, of which the first is champion."""
    client = tracking.connect(tmp_path_factory.mktemp("client"))
    for number in (1, 2):
        assert add_model(client, NAME, folders[number], scores={"overall": 0.5 + number / 10}) == str(number)
    assert promote(client, NAME, "1").moved
    return client


def test_what_is_registered_lies_in_the_database_and_the_bucket(stores, client, folders):
    postgres, s3 = stores
    assert postgres.rows("SELECT name, version FROM model_versions ORDER BY version") == [(NAME, 1), (NAME, 2)]
    assert postgres.rows("SELECT alias, version FROM registered_model_aliases") == [("champion", 1)]
    weights = [name for name in names_in_bucket(s3) if name.endswith("model.safetensors")]
    assert len(weights) == 2
    sizes = {(folder / "model.safetensors").stat().st_size for folder in folders.values()}
    assert sizes == {s3_client(s3).head_object(Bucket="models", Key=name)["ContentLength"] for name in weights}


def test_promotion_moves_the_alias_that_a_client_without_keys_loads_by(stores, server, client, folders, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "workflows.cli", "models", "promote", f"{NAME}/2", "--json"]
    done = subprocess.run(
        [*command, "--storage", tmp_path / "here"],
        env=environment | {"MLFLOW_TRACKING_URI": server},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["previous"] == "1"
    assert stores[0].rows("SELECT version FROM registered_model_aliases WHERE alias = 'champion'") == [(2,)]
    loaded = resolve_model(f"models:/{NAME}@champion", tmp_path / "there")
    assert (loaded.name, loaded.version) == (NAME, "2")
    for name in ("config.json", "model.safetensors"):
        assert (loaded.folder / name).read_bytes() == (folders[2] / name).read_bytes()
    assert rollback(client, NAME).version == "1"
    assert resolve_model(f"models:/{NAME}@champion", tmp_path / "there").version == "1"


def test_movers_at_the_same_time_take_turns(client):
    def move(number: int) -> str:
        try:
            return "moved" if promote(client, NAME, str(1 + number % 2), "busy").moved else "there"
        except WorkflowError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(move, range(4)))
    refused = [outcome for outcome in outcomes if outcome not in ("moved", "there")]
    assert all("is being moved by" in outcome for outcome in refused)  # on a busy machine one may wait too long
    assert "moved" in outcomes
    moves = [move for move in history(client) if move["alias"] == "busy"]
    assert len(moves) == outcomes.count("moved")
    assert [move["was"] for move in moves[1:]] == [move["to"] for move in moves[:-1]]  # nobody overwrote
    assert holder(client, NAME, "busy") == moves[-1]["to"]


def test_the_server_answers_under_its_names_alone(server):
    for host, expected in (("mlflow:5000", 200), ("evil.example:5000", 403)):
        request = urllib.request.Request(f"{server}/api/2.0/mlflow/registered-models/search", headers={"Host": host})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                status = response.status
        except urllib.error.HTTPError as error:
            status = error.code
        assert status == expected, host
    with urllib.request.urlopen(f"{server}/health", timeout=30) as response:  # what the probes ask
        assert response.status == 200


def test_a_restarted_server_knows_the_same(stores, client, tmp_path):
    with mlflow_on(*stores, tmp_path) as uri:  # a second one on the same stores: the bucket and the tables are there
        found = mlflow.MlflowClient(uri).get_model_version_by_alias(NAME, "champion")
    assert found.version == holder(client, NAME, "champion")


def test_the_password_shows_neither_in_the_log_nor_among_processes(stores, server, tmp_path_factory):
    password = stores[0].password.removeprefix("p@ss/")
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "mlflow" in lines
    assert password not in lines
    logs = list(tmp_path_factory.getbasetemp().rglob("server.log"))
    assert logs
    assert not any(password in log.read_text() for log in logs)


def test_a_missing_variable_is_named():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("POSTGRES_", "MLFLOW_"))}
    command = [sys.executable, CLUSTER / "docker" / "mlflow_server.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "POSTGRES_HOST, POSTGRES_DB, POSTGRES_USER, POSTGRES_PASSWORD, MLFLOW_BUCKET must be set" in done.stderr


def history(client) -> list[dict]:
    from workflows.registry import show_model

    return show_model(client, NAME)["moves"]


def s3_client(s3):
    import boto3

    return boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")


def names_in_bucket(s3) -> list[str]:
    pages = s3_client(s3).get_paginator("list_objects_v2").paginate(Bucket="models")
    return [item["Key"] for page in pages for item in page.get("Contents", [])]
