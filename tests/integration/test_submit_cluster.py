"""`mlmamba submit` to a real cluster: a head and two workers as `ray start` processes, with a token.

The head has no CPU, each worker one: so the two training workers are on different nodes. The whole workflow is slow
here, for every node starts its own processes; the quick tests send a preparation, which takes the same way.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.helpers.ray_cluster import RayCluster, lines_until
from tests.helpers.registry_server import mlflow_server
from tests.helpers.s3 import KEYS, running_s3
from tests.helpers.toy_workflow import recipe, write_corpus, write_recipe
from workflows.cli import main
from workflows.registry.models import resolve_model

SUMMARY = {"recipe", "run_id", "data", "model", "evaluation", "samples", "example", "storage"}


@pytest.fixture(scope="module")
def cluster():
    with RayCluster(workers=2) as running:
        yield running


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root)
    return root


@pytest.fixture
def file(corpus, tmp_path) -> Path:
    """A recipe of its own for each test, so that their jobs are different workflows. Its last stage can be hit."""
    content = recipe(corpus, name=f"t{os.getpid()}")
    content["train"]["stages"][1]["steps"] = 120
    content["register_as"]["name"] = "tiny"
    return write_recipe(tmp_path / "tiny.yaml", content)


def job_of(lines: list[str]) -> str:
    (line,) = [line for line in lines if line.startswith("   job ")]
    return line.split()[1]


def end_of(cluster: RayCluster, job: str) -> dict:
    """Follow a job to its end; returns the summary."""
    done = cluster.submitted("--follow", job, "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_job_runs_on_the_cluster_and_comes_back_like_a_local_run(cluster, file, tmp_path):
    done = cluster.submitted(file, "--storage", tmp_path / "storage", "--verb", "prepare", "--json")
    assert done.returncode == 0, done.stderr
    (content,) = json.loads(done.stdout)["data"].values()
    assert content["splits"]["train"]["samples"] == 47
    assert content["splits"]["train"]["quarantined"] == {"image_truncated": 1}
    assert "ships " in done.stderr
    assert "== prepare" in done.stderr  # the job's own progress
    assert "INFO" not in done.stderr  # and not Ray's
    job = job_of(done.stderr.splitlines(True))
    shown = cluster.submitted("--status")
    assert f"SUCCEEDED  {job}" in shown.stdout
    again = cluster.submitted("--follow", job)
    assert again.returncode == 0
    assert f"digest {content['digest']}" in again.stdout
    unknown = cluster.submitted("--follow", "no-such-job")
    assert unknown.returncode == 1
    assert f"knows no job no-such-job; the latest are: {job}" in unknown.stderr


@pytest.mark.slow
def test_a_job_that_fails_says_why_and_gives_code_1(cluster, file, tmp_path):
    done = cluster.submitted(
        *(file, "--storage", tmp_path / "storage", "--verb", "prepare"),
        *("--set", f"data.train.0.annotations={tmp_path}/nowhere.json"),
    )
    assert done.returncode == 1
    assert f"mlmamba: job {job_of(done.stderr.splitlines(True))} failed: mlmamba: preparation:" in done.stderr
    assert "nowhere.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_wrong_token_and_a_wrong_python_are_told(cluster, file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "not-the-token-of-this-cluster-at-all")
    assert main(["submit", str(file), "--address", cluster.address, "--storage", str(tmp_path)]) == 1
    assert "does not take this machine's token" in capsys.readouterr().err
    done = cluster.submitted(file, "--storage", tmp_path / "s", "--verb", "prepare", "--python", "python-nowhere")
    assert done.returncode == 1
    assert "python-nowhere: not found" in done.stderr


@pytest.mark.slow
def test_the_whole_workflow_on_two_nodes_with_the_client_killed_in_the_middle(cluster, file, tmp_path):
    client = cluster.submit(file, "--storage", tmp_path / "storage")
    job = job_of(lines_until(client, "== prepare"))
    client.send_signal(signal.SIGKILL)
    client.communicate()
    watching = cluster.submit("--follow", job)
    lines_until(watching, "== prepare")
    watching.send_signal(signal.SIGINT)
    out, _ = watching.communicate(timeout=60)
    assert watching.returncode == 1
    assert "the job goes on without this client" in out
    assert f"mlmamba submit --stop {job} --address {cluster.address}" in out
    second = cluster.submitted(file, "--storage", tmp_path / "storage")
    assert second.returncode == 1
    assert f"is under way already on this storage, as job {job}" in second.stderr

    summary = end_of(cluster, job)
    assert summary.keys() == SUMMARY
    assert json.loads(next(tmp_path.glob("storage/runs/*/summary.json")).read_text()) == summary
    assert not list(tmp_path.glob("storage/runs/*/*lock*"))
    actors = cluster.get("/api/v0/actors?limit=1000&detail=1").json()["data"]["result"]["result"]
    trained_on = {actor["node_id"] for actor in actors if "RayTrainWorker" in actor["class_name"]}
    assert len(trained_on) == 2
    client = MlflowClient(f"sqlite:///{tmp_path}/storage/mlflow.db")
    run = client.get_run(summary["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlmamba.git"] != "unknown"  # of the client's checkout, which did not travel

    again = cluster.submitted(file, "--storage", tmp_path / "storage", "--json", timeout=900)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before, skipped") == 4
    assert json.loads(again.stdout) == summary


@pytest.mark.slow
def test_stopped_in_training_and_submitted_again_it_goes_on_in_the_same_run(cluster, file, tmp_path):
    client = cluster.submit(file, "--storage", tmp_path / "storage")
    lines = lines_until(client, "step 4/120")
    job = job_of(lines)
    time.sleep(2)
    stopped = cluster.submitted("--stop", job, "--json")
    assert stopped.returncode == 0, stopped.stderr
    assert json.loads(stopped.stdout)["status"] == "STOPPED"
    _, err = client.communicate(timeout=120)
    assert client.returncode == 1
    assert f"job {job} was stopped; submit the recipe again to go on" in err
    mlflow = MlflowClient(f"sqlite:///{tmp_path}/storage/mlflow.db")
    (experiment,) = (e.experiment_id for e in mlflow.search_experiments() if e.name != "Default")
    (run,) = mlflow.search_runs([experiment])
    assert run.info.status == "KILLED"
    assert not list(tmp_path.glob("storage/runs/*/lock.json"))

    again = cluster.submitted(file, "--storage", tmp_path / "storage", "--json", timeout=900)
    assert again.returncode == 0, again.stderr
    assert "going on from the checkpoint of step" in again.stderr
    summary = json.loads(again.stdout)
    assert summary["run_id"] == run.info.run_id
    steps = [m.step for m in mlflow.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 122


@pytest.mark.slow
def test_a_storage_that_a_node_does_not_share_is_told_before_any_work(cluster, file, tmp_path):
    """A third node, in a mount namespace of its own, has an empty folder where the others have the storage."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    storage = tmp_path / "storage"
    storage.mkdir()
    node = cluster.add(hidden=storage)
    try:
        cluster.wait_for(4)
        done = cluster.submitted(file, "--storage", storage)
    finally:
        cluster.kill(node)
        cluster.wait_for(3)
    assert done.returncode == 1
    assert "1 of 3 other nodes cannot take part" in done.stderr
    assert "or has another folder there" in done.stderr
    assert not (storage / "data").exists()
    assert not list(storage.glob(".seen-*"))


@pytest.mark.slow
def test_a_worker_node_is_lost_in_training_and_the_job_finishes(cluster, file, tmp_path):
    client = cluster.submit(file, "--storage", tmp_path / "storage", "--json", "--set", "train.stages.1.steps=600")
    lines_until(client, "/600  loss")
    lines_until(client, "/600  loss")  # lines are seconds apart, by then there are checkpoints
    cluster.add()
    (victim,) = [node for node in cluster.nodes[:2] if cluster.workers_of(node, "RayTrainWorker")][:1]
    cluster.kill(victim)
    out, err = client.communicate(timeout=900)
    assert client.returncode == 0, err
    assert "going on from the checkpoint of step" in err
    assert json.loads(out).keys() == SUMMARY


@pytest.mark.slow
def test_storage_in_an_object_store_needs_no_common_folder(cluster, file, tmp_path, monkeypatch, capsys):
    """Its URI has characters that mean something to a shell. The head, which has no CPU here, cannot evaluate."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    monkeypatch.setenv("MLMAMBA_CACHE", str(tmp_path / "cache"))
    sent = [word for name in (*KEYS, "MLMAMBA_CACHE") for word in ("--env", name)]
    with running_s3() as s3, mlflow_server(tmp_path / "mlflow") as (server, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        uri = s3.uri("lab")
        command = ["submit", str(file), "--address", cluster.address, "--storage", uri, *sent]
        assert main(command) == 1
        assert "evaluates by itself, and it has not the 1 CPUs" in capsys.readouterr().err
        assert s3.names("lab/data") == []
        assert main([*command, "--verb", "train", "--json", "--set", "train.stages.1.steps=12"]) == 0
        model = json.loads(capsys.readouterr().out)["model"]
        assert model.startswith("s3://bucket/lab/runs/")
        assert (resolve_model(model, tmp_path).folder / "model.safetensors").exists()
        assert not [name for name in s3.names("lab") if "lock" in name]
