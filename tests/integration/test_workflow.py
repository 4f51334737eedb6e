"""The main job on the real parts, tiny: Ray Data, Ray Train with two DeepSpeed workers, MLflow, evaluation, chat.

One run is shared by the tests that look at it; another is killed in the middle and must end in the same model.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from mlmamba.loading import load_model
from tests.helpers.processes import free_port
from tests.helpers.ray_cluster import lines_until, listen_to_interrupts
from tests.helpers.serve_client import ask
from tests.helpers.toy_workflow import mlmamba, recipe, start, write_corpus, write_recipe
from workflows.recipe.load import load_recipe
from workflows.rerun import find_finished_run, leave_mark
from workflows.serve.start import serve_model
from workflows.storage.folder import Folder
from workflows.storage.layout import layout_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root)
    return root


@pytest.fixture(scope="module")
def recipe_file(corpus) -> Path:
    return write_recipe(corpus / "tiny.yaml", recipe(corpus))


@pytest.fixture(scope="module")
def finished(recipe_file, tmp_path_factory) -> dict:
    """Summary of one whole run."""
    result = mlmamba("run", recipe_file, "--storage", tmp_path_factory.mktemp("storage"), "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout) | {"stderr": result.stderr}


def test_the_run_ends_in_a_registered_and_promoted_model(finished):
    client = MlflowClient(f"sqlite:///{finished['storage']}/mlflow.db")
    assert int(client.get_model_version_by_alias("tiny", "champion").version) == 1
    assert finished["model"]["promoted"]


def test_every_question_is_scored_beside_the_baselines(finished):
    evaluation = finished["evaluation"]
    assert evaluation["questions"]["overall"] == 36
    for table in ("scores", "blind", "majority"):
        assert 0 <= evaluation[table]["overall"] <= 1
    assert evaluation["majority"]["overall"] == pytest.approx(1 / 3)


def test_one_mlflow_run_holds_parameters_losses_and_data(finished):
    client = MlflowClient(f"sqlite:///{finished['storage']}/mlflow.db")
    run = client.get_run(finished["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.stages.1.name"] == "full"
    losses = client.get_metric_history(finished["run_id"], "train/loss")
    for name, value in (("train/workers", 2.0), ("train/restarts", 0.0)):
        history = client.get_metric_history(finished["run_id"], name)
        assert [(m.step, m.value) for m in history] == [(m.step, value) for m in losses]
    assert [m.step for m in losses] == [2, *range(6, 43, 4)]
    assert losses[-1].value < losses[0].value
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.digest == finished["data"]["digest"].removeprefix("sha256:")[:36]
    assert {f.path for f in client.list_artifacts(finished["run_id"])} >= {"samples.png", "scores.json"}
    experiments = [e.experiment_id for e in client.search_experiments()]
    assert len(client.search_runs(experiments)) == 1


def test_the_connector_stage_trains_the_connector_alone(finished):
    run = Path(finished["model"]["folder"]).parents[1]
    before = load_file(run / "initial" / "model.safetensors")
    after = load_file(run / "stages" / "connector" / "model.safetensors")
    last = load_file(run / "stages" / "full" / "model.safetensors")
    assert before.keys() == after.keys() == last.keys()
    moved = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert moved == {"connector"}
    moved = {name.split(".")[0] for name in before if not after[name].equal(last[name])}
    assert moved == {"connector", "language_model"}
    assert "stage connector: trains connector (" in finished["stderr"]


def test_one_group_of_workers_does_all_stages_and_the_evaluation(finished):
    """What a stage leaves in them changes nothing: the killed run below trains its last stage in a fresh group."""
    assert finished["stderr"].count("starting 2 workers ...") == 1
    assert finished["stderr"].count("2 workers are there after") == 1
    assert "6/6 batches" in finished["stderr"]


def test_a_second_run_does_nothing_and_says_so(finished, recipe_file):
    again = mlmamba("run", recipe_file, "--storage", finished["storage"], "--json")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before, skipped") == 4  # data, two stages, evaluation
    ours = {k: v for k, v in finished.items() if k != "stderr"}
    assert json.loads(again.stdout) == ours


def test_a_second_run_does_nothing_without_torch_ray_and_mlflow(finished, recipe_file):
    command = [sys.executable, "-X", "importtime", "-m", "workflows.cli", "run", recipe_file]
    again = subprocess.run([*command, "--storage", finished["storage"]], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    loaded = {line.rpartition("|")[2].strip() for line in again.stderr.splitlines() if line.startswith("import time:")}
    assert "pydantic" in loaded
    assert not loaded & {"torch", "ray", "mlflow", "transformers", "timm", "deepspeed"}


@pytest.mark.parametrize("change", ["alias", "tag", "model", "evaluation", "test", "recipe", "run"])
def test_what_is_not_as_it_was_left_is_work_again(finished, recipe_file, tmp_path, change):
    """On a copy of the storage, with the one thing changed."""
    source, chosen = Path(finished["storage"]), load_recipe(str(recipe_file))
    storage = tmp_path / "storage"
    shutil.copytree(source, storage)
    layout = layout_of(chosen, Folder(str(storage)), chosen.model.stated_tokens)
    summary = json.loads((layout.run.local / "summary.json").read_text())
    summary["model"]["folder"] = str(storage / Path(summary["model"]["folder"]).relative_to(source))
    leave_mark(chosen, layout, summary)
    assert find_finished_run(chosen, layout, 4)
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    if change == "alias":
        client.delete_registered_model_alias("tiny", "champion")
    elif change == "tag":
        client.set_model_version_tag("tiny", "1", "mlmamba.scores", "{}")
    elif change == "run":
        client.delete_run(summary["run_id"])
    elif change == "model":
        (Path(summary["model"]["folder"]) / "model.safetensors").touch()
    elif change == "evaluation":
        next(layout.evaluation.local.glob("*/scores.json")).unlink()
    elif change == "test":
        test = json.loads(Path(chosen.data.test[0].annotations).read_text())
        moved = tmp_path / "test.json"
        moved.write_text(json.dumps(test[1:]))
        chosen.data.test[0].annotations = str(moved)
    elif change == "recipe":
        chosen.evaluate.gate.least["overall"] = 0.5
    assert find_finished_run(chosen, layout, 4) is None


@pytest.mark.slow
def test_the_champion_answers_in_the_terminal_and_over_http_alike(finished):
    reference, storage, example = "models:/tiny@champion", finished["storage"], finished["example"]
    asked = ("--image", example["image"], "--question", example["question"])
    said = mlmamba("chat", reference, "--storage", storage, *asked, "--json")
    assert said.returncode == 0, said.stderr
    port = free_port()
    with serve_model(reference, Path(storage), port=port, block=False) as server:
        answer = ask(server.url, example["question"], example["image"], max_tokens=64)
    assert answer == json.loads(said.stdout)["answer"]


def test_the_model_folder_opens_by_itself(finished):
    model, processor = load_model(finished["model"]["folder"])
    assert processor.tokens_per_image == 4
    assert model.config.image_token_id == processor.image_token_id


def test_killed_in_training_it_goes_on_and_ends_in_the_same_weights(finished, recipe_file, tmp_path):
    """SIGKILL to all its processes in the last stage as soon as that has a checkpoint; then the training goes on.

    What comes before the last stage is taken from the undisturbed run. The workers are killed with the driver: they
    would outlive it long enough to finish so short a stage.
    """
    run = Path(finished["model"]["folder"]).parents[1]
    for done in (Path(finished["storage"]) / "data", run / "initial", run / "stages" / "connector"):
        shutil.copytree(done, tmp_path / done.relative_to(finished["storage"]))
    killed = start("run", recipe_file, "--storage", tmp_path)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("runs/*/checkpoints/full-*/step-*/complete.json")) and time.monotonic() < deadline:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.02)
    workers = psutil.Process(killed.pid).children(recursive=True)
    for process in (*reversed(workers), killed):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    killed.communicate()
    again = mlmamba("train", recipe_file, "--storage", tmp_path, "--json")
    assert again.returncode == 0, again.stderr
    assert "going on from the checkpoint of step" in again.stderr
    folders = json.loads(again.stdout)["model"], finished["model"]["folder"]
    assert folders[0] != folders[1]
    ours, undisturbed = (load_file(Path(folder) / "model.safetensors") for folder in folders)
    assert all(ours[name].equal(undisturbed[name]) for name in undisturbed)


def test_ctrl_c_in_training_is_one_line_and_leaves_no_process(finished, recipe_file, tmp_path):
    run = Path(finished["model"]["folder"]).parents[1]
    for done in (Path(finished["storage"]) / "data", run / "initial", run / "stages" / "connector"):
        shutil.copytree(done, tmp_path / done.relative_to(finished["storage"]))
    command = [sys.executable, "-m", "workflows.cli", "run", recipe_file, "--storage", tmp_path]
    stopped = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen_to_interrupts)
    lines = lines_until(stopped, "workers are there")
    children = psutil.Process(stopped.pid).children(recursive=True)
    stopped.send_signal(signal.SIGINT)
    rest = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 1, [*lines, rest]
    assert rest.rstrip().endswith("mlmamba: stopped; run the same command again to go on")
    assert "Traceback" not in rest
    assert not psutil.wait_procs(children, timeout=30)[1]
