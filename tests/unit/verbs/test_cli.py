"""The command line: exit codes, where output goes, and one clear message for each mistake.

One test starts the installed command; the others call `main`, which spares each the seconds of importing torch.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import ray

from tests.helpers.toy_workflow import recipe, write_corpus, write_recipe
from workflows.cli import VERBS, main
from workflows.runtime import accelerators
from workflows.verbs.tools import operator_finding


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def mlmamba(capsys):
    """Run one command line in this process."""

    def run(*arguments) -> Result:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse's own
            code = stop.code
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    yield run
    ray.shutdown()


def test_the_installed_command_starts():
    command = Path(sys.executable).with_name("mlmamba")
    result = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "ML-Mamba from corpus to served model" in result.stdout


def test_help_names_every_verb(mlmamba):
    result = mlmamba("--help")
    assert result.returncode == 0
    for verb in VERBS:
        assert f"    {verb}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fly"], 2, "invalid choice: 'fly'"),
        (["run"], 2, "required: recipe"),
        (["run", "nowhere.yaml"], 2, "cannot read recipe nowhere.yaml"),
        (["run", "quickstart", "--set", "train.worker=1"], 2, "unknown key; did you mean 'workers'?"),
        (["run", "quickstart", "--set", "model.image_size=9"], 2, "unknown key; did you mean model.vision.image_size?"),
        (["run", "quickstart", "--set", "train.epochs=9"], 2, "unknown key; did you mean train.stages.N.epochs?"),
        (["run", "quickstart", "--set", "model.text.weights=/nowhere"], 2, "text.weights: cannot load /nowhere"),
        (["train", "quickstart", "--stage", "middle"], 2, "the recipe's stages are connector, full"),
        (["chat", "nowhere", "--question", "?"], 1, "nowhere is neither a model folder"),
        (["chat", "models:/none@champion", "--question", "?"], 1, "there is no model none in the registry"),
        (["chat", "nowhere", "--image", "nowhere.png", "--question", "?"], 2, "--image nowhere.png: No such file"),
        (
            ["chat", "nowhere", "--image", "pyproject.toml", "--question", "?"],
            2,
            "not an image but text: '[build",
        ),
    ],
)
def test_a_mistake_gets_one_message_and_its_exit_code(arguments, code, message, tmp_path, mlmamba):
    if arguments[0] in VERBS:
        arguments = [*arguments, "--storage", str(tmp_path / "storage")]
    result = mlmamba(*arguments)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_storage_that_is_a_file_is_bad_usage(tmp_path, mlmamba):
    (tmp_path / "storage").write_text("")
    result = mlmamba("run", "quickstart", "--storage", tmp_path / "storage")
    assert result.returncode == 2
    assert "choose another folder" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": "elsewhere"},
            "data.train.0.images: there is no folder or zip elsewhere, and the first records",
        ),
        ({"annotations": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_a_corpus_that_is_not_there_fails_and_leaves_no_data_set(changes, message, tmp_path, mlmamba):
    write_corpus(tmp_path)
    content = recipe(tmp_path)
    content["data"]["train"][0] |= changes
    file = write_recipe(tmp_path / "recipe.yaml", content)
    result = mlmamba("prepare", file, "--storage", tmp_path / "storage")
    assert result.returncode == 1, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("storage/data/*/manifest.json"))


def test_more_workers_than_cpus_is_said_before_anything_starts(tmp_path, mlmamba):
    write_corpus(tmp_path, count=8)
    content = recipe(tmp_path)
    content["train"]["workers"] = content["train"]["stages"][0]["batch_rows"] = 1000
    content["train"]["stages"][1]["batch_rows"] = 1000
    result = mlmamba("run", write_recipe(tmp_path / "recipe.yaml", content), "--storage", tmp_path / "storage")
    assert result.returncode == 1
    assert "training wants 1000 workers x 1 CPU" in result.stderr


def test_doctor_says_what_is_installed_and_which_path_runs(mlmamba):
    result = mlmamba("doctor", "--json")
    assert result.returncode == 0
    findings = {item["name"]: item for item in json.loads(result.stdout)["findings"]}
    assert findings["torch"]["state"] == "ok"
    assert "path" in findings["operators"]["detail"]


@pytest.mark.skipif(bool(find_spec("mamba_ssm") or find_spec("causal_conv1d")), reason="the kernels are installed here")
def test_doctor_names_the_kernel_that_runs_in_place_of_one_that_does_not_import():
    finding = operator_finding("causal_conv1d")
    assert finding.state == "note"
    assert finding.detail.startswith("cuda path (triton_convolution): causal_conv1d does not import: ")
    assert "install-on-gpu.md" in finding.advice
    assert operator_finding("ssd").detail.startswith("torch path: mamba_ssm does not import: ModuleNotFoundError")
    assert (
        operator_finding("ssd", "OLD has compute capability 6.1").detail == "torch path: OLD has compute capability 6.1"
    )


def test_an_empty_registry_is_said_plainly(tmp_path, mlmamba):
    result = mlmamba("models", "list", "--storage", tmp_path)
    assert result.returncode == 0
    assert "no registered models" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["doctor"], ["models", "list"]])
def test_a_command_that_needs_no_torch_does_not_import_it(arguments, tmp_path):
    """In a process of its own, where nothing else has. `doctor` asks torch only where there is a GPU to ask about."""
    if arguments == ["doctor"] and accelerators():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "-X", "importtime", "-m", "workflows.cli", *arguments]
    storage = ["--storage", str(tmp_path)] if "list" in arguments else []
    result = subprocess.run([*command, *storage], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in loaded
    assert not loaded & {"torch", "ray", "transformers", "timm", "deepspeed"}


def test_a_comparison_with_other_items_is_refused_before_the_model_is_looked_for(mlmamba, tmp_path):
    def corpus(name: str, record: str) -> Path:
        turns = [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "red"}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(json.dumps([{"id": record, "conversations": turns}]))
        return tmp_path / name

    first, other = corpus("first", "a"), corpus("other", "b")
    (tmp_path / "said.json").write_text(json.dumps([{"id": "a/0", "answer": "red"}]))
    made = ("--benchmark", "llava", "--storage", tmp_path / "storage")
    done = mlmamba("evaluate", *made, "--data", first, "--predictions", tmp_path / "said.json", "--json")
    assert done.returncode == 0, done.stderr
    folder = json.loads(done.stdout)["folder"]
    asked = mlmamba("evaluate", tmp_path / "no-model", *made, "--data", other, "--compare", folder)
    assert asked.returncode == 2
    assert f"--compare {folder}: it holds answers to 1 items, none of which is among the 1 of llava" in asked.stderr
    scores = Path(folder, "scores.json")
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"benchmark": "pope"}))
    asked = mlmamba("evaluate", tmp_path / "no-model", *made, "--data", first, "--compare", folder)
    assert asked.returncode == 2
    assert "pope cannot be compared with llava: give the same benchmark" in asked.stderr


def test_a_folder_with_several_lists_says_how_one_is_named(mlmamba, tmp_path):
    for name in ("b.json", "a.json"):
        (tmp_path / name).write_text("[]")
    done = mlmamba("evaluate", "model", "--benchmark", "llava", "--data", tmp_path, "--storage", tmp_path / "storage")
    assert done.returncode == 2
    assert f"several (a.json, b.json): name one of them, as in --data {tmp_path / 'a.json'}" in done.stderr
