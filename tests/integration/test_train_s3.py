"""Training whose storage is an object store: stopped, killed, moved to another machine, and still the same weights.

"Another machine" is a cache folder that was emptied: nothing of the work is left but what the store has. The quick
test runs the workers' own loop without Ray; the slow ones kill workers under Ray Train, and the whole workflow with an
MLflow server beside the store.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file

from pipelines import storage as files
from tests.benchmarks.drills.train_faults import Killer
from tests.helpers.registry_server import mlflow_server
from tests.helpers.s3 import S3, running_s3
from tests.helpers.toy_stage import toy_recipe
from tests.helpers.toy_training import Toy, Workers, difference, make_toy, same
from tests.helpers.toy_workflow import mlmamba, recipe, write_corpus, write_recipe
from workflows.recipe.schema import Recipe
from workflows.registry.models import resolve_model
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout, open_storage
from workflows.train.checkpoint import CheckpointStore
from workflows.train.job import finished, stage_digest
from workflows.train.reshard import reshard_run
from workflows.train.trainer import run_stage


@contextmanager
def changed_environment(**values: str):
    """Environment variables, for processes that are started in the block too."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def s3(cache):
    with changed_environment(MLMAMBA_CACHE=str(cache)), running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def there(toy, s3) -> dict[str, str]:
    """URIs of the toy's data and initial model."""
    copy_to(s3.uri("toy/initial"), toy.initial)
    return {"data": s3.upload(toy.data, "toy/data"), "start_from": s3.uri("toy/initial")}


@pytest.fixture(scope="module")
def far_workers(s3):
    """Two workers with the store's keys and the cache in their environment."""
    group = Workers(2)
    yield group
    group.close()


def copy_to(uri: str, folder: Path) -> None:
    """Put a folder of this machine into the store."""
    with Folder(uri).writing() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)


def steps(s3: S3, folder: str) -> list[int]:
    """Steps of the whole checkpoints."""
    marks = [name.split("/")[-2] for name in s3.names(folder) if name.endswith("/complete.json")]
    return [int(name[5:13]) for name in marks if name.startswith("step-")]


def test_stopped_and_resumed_on_another_machine_the_weights_are_those_of_a_local_run(
    toy, undisturbed, s3, there, far_workers, cache, tmp_path
):
    job = replace(
        toy.job(tmp_path, save_every=2),
        **there,
        mark='{"digest": "x"}',
        checkpoints=s3.uri("run/checkpoints"),
        export_to=s3.uri("run/model"),
    )
    assert far_workers.train(job, stop_after=5).result == "stopped"
    assert steps(s3, "run/checkpoints") == [2, 4]
    assert not list(Folder(job.checkpoints).local.rglob("*.pt"))  # the staging folder is empty again
    newest = CheckpointStore(Folder(job.checkpoints)).newest()
    unfinished = files.join(job.checkpoints, "step-00000006.dead", "x.pt")
    files.write_atomic(unfinished, b"x")
    shutil.rmtree(cache)
    second = far_workers.train(job)
    assert second.of("start")[0]["step"] == newest.step == 4
    assert not files.exists(unfinished)
    assert Folder(job.export_to).whole()
    shutil.rmtree(cache)
    model = resolve_model(job.export_to, tmp_path).folder
    assert same(load_file(model / "model.safetensors"), undisturbed(2).weights)
    assert json.loads((model / "stage.json").read_text()) == {"digest": "x"}
    assert not list(tmp_path.iterdir())  # nothing is written elsewhere


@pytest.mark.slow
def test_another_number_of_workers_goes_on_from_the_store(toy, undisturbed, s3, there, far_workers, tmp_path):
    place = {"checkpoints": s3.uri("fewer/checkpoints"), "export_to": s3.uri("fewer/model")}
    far_workers.train(replace(toy.job(tmp_path, save_every=2, zero_stage=3), **there, **place), stop_after=4)
    alone = Workers(1)
    try:
        second = alone.train(replace(toy.job(tmp_path, save_every=2, zero_stage=3, workers=1), **there, **place))
    finally:
        alone.close()
    assert second.of("start")[0]["resharded_from"] == 2
    weights = load_file(Folder(place["export_to"]).fetch() / "model.safetensors")
    assert difference(weights, undisturbed(3).weights) < 2e-4


def test_a_checkpoint_in_the_store_is_resharded_there(toy, s3, there, far_workers, tmp_path):
    run, key = Folder(s3.uri("resharded")), "resharded/checkpoints/full-key"
    copy_to((run / "initial").uri, toy.initial)
    job = toy.job(tmp_path, save_every=2, zero_stage=3)
    place = {"checkpoints": s3.uri(key), "export_to": s3.uri("resharded/model")}
    far_workers.train(replace(job, **there, **place), stop_after=2)
    done = reshard_run(run, 3)
    assert steps(s3, key) == [2]
    store = CheckpointStore(Folder(s3.uri(key)))
    assert store.newest() == done.checkpoint
    assert store.newest().workers == 3
    assert not list(Folder(s3.uri(key)).local.rglob("*.pt"))  # no copy is left
    assert str(done).startswith("stage full, step 2: s3://")
    reshard_run(run, 2)
    second = far_workers.train(replace(job, **there, **place))
    assert second.of("start")[0]["resharded_from"] is None


@pytest.mark.slow
def test_a_store_that_goes_away_ends_the_stage_and_what_was_whole_stays(toy, s3, there, far_workers, tmp_path):
    """The bucket's name is another's from step 4 on, so that uploads are refused."""
    place = {"checkpoints": s3.uri("away/checkpoints"), "export_to": s3.uri("away/model")}
    far_workers.train(replace(toy.job(tmp_path, save_every=2), **there, **place), stop_after=2)
    nowhere = {name: uri.replace("//bucket/", "//other/") for name, uri in place.items()}
    said = far_workers.train(replace(toy.job(tmp_path, save_every=2), **there, **nowhere)).result
    assert "the checkpoint of step 2 could not be written to s3://other/away/checkpoints" in said
    assert steps(s3, "away/checkpoints") == [2]
    assert far_workers.train(replace(toy.job(tmp_path), **there, **place)).of("start")[0]["step"] == 2


@pytest.fixture
def ray_with_s3(s3):
    """A Ray whose workers know the store's keys and the cache."""
    ray.shutdown()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def run_stage_on(uri: str, toy: Toy, chosen: Recipe, on_event) -> Folder:
    """The recipe's stage with its storage in an object store."""
    storage = open_storage(uri)
    layout = Layout(storage, {"full": storage / "data" / "toy"}, storage / "runs" / "toy")
    if not layout.initial.whole():
        copy_to(layout.initial.uri, toy.initial)
    return run_stage(chosen, chosen.train.stages[0], layout, {"full": "toy"}, on_event)


@pytest.mark.slow
def test_workers_killed_under_ray_train_cost_steps_but_change_nothing(s3, ray_with_s3, cache, tmp_path):
    toy = make_toy(tmp_path / "toy")
    chosen = toy_recipe(toy, {"steps": 30, "batch_rows": 2}, save_every=3, max_failures=4)
    s3.upload(toy.data, "killed/data/toy")
    s3.upload(toy.data, "whole/data/toy")
    events: list[dict] = []
    whole = run_stage_on(s3.uri("whole"), toy, chosen, events.append)
    starts, killer = [], Killer(kills=2, within=8, seed=1)

    def on_event(event: dict) -> None:
        if event["event"] == "start":
            starts.append(event["step"])
        killer(event)

    disturbed = run_stage_on(s3.uri("killed"), toy, chosen, on_event)
    assert len(killer.done) == 2
    assert len(starts) == 3
    assert any(starts)
    assert finished(disturbed, stage_digest(chosen, 0, {"full": "toy"}))
    assert not finished(disturbed, "another")
    shutil.rmtree(cache)
    one, other = (load_file(folder.fetch() / "model.safetensors") for folder in (whole, disturbed))
    assert same(one, other)
    assert steps(s3, "killed") == []  # of a finished stage none is kept
    assert not [name for name in s3.names("killed") if ".ray" in name]


@pytest.mark.slow
def test_the_whole_workflow_is_killed_and_goes_on_elsewhere(s3, cache, tmp_path):
    write_corpus(tmp_path / "corpus")
    content = recipe(tmp_path / "corpus")
    content["train"]["stages"][1]["steps"] = 120
    file = write_recipe(tmp_path / "tiny.yaml", content)
    with mlflow_server(tmp_path / "mlflow") as (server, _):
        first = start_with(server, "run", file, "--storage", s3.uri("lab"))
        lines = []
        for line in first.stderr:
            lines.append(line)
            if "step 4/120" in line:
                break
        else:
            raise AssertionError("".join(lines))
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        assert [name for name in s3.names("lab") if name.endswith(".json") and "lock" in name]
        shutil.rmtree(cache)
        done = start_with(server, "run", file, "--storage", s3.uri("lab"), "--json")
        out, err = done.communicate(timeout=900)
        assert done.returncode == 0, err
        assert "going on from the checkpoint of step" in err
        summary = json.loads(out)
        assert summary["storage"] == s3.uri("lab")
        assert summary["model"]["folder"].startswith("s3://bucket/lab/runs/")
        assert not [name for name in s3.names("lab") if "lock" in name]
        shutil.rmtree(cache)
        again = start_with(server, "run", file, "--storage", s3.uri("lab"), "--json")
        out, err = again.communicate(timeout=900)
        assert again.returncode == 0, err
        assert err.count("done before, skipped") == 4
        assert json.loads(out) == summary | {"example": json.loads(out)["example"]}
        scored = mlmamba("evaluate", summary["model"]["folder"], "--recipe", file, "--storage", tmp_path / "here")
        assert scored.returncode == 0, scored.stderr
        local = mlmamba("train", file, "--storage", tmp_path / "local", "--json")
        assert local.returncode == 0, local.stderr
    far = Folder(summary["model"]["folder"]).fetch() / "model.safetensors"
    near = Path(json.loads(local.stdout)["model"]) / "model.safetensors"
    assert same(load_file(far), load_file(near))


def start_with(server: str, *arguments: str | Path) -> subprocess.Popen:
    """The command line with an MLflow server, as a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "workflows.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"MLFLOW_TRACKING_URI": server},
    )
