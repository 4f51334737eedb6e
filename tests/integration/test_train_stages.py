"""What stages can be, and what happens to those that go wrong, on two real workers."""

import resource
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.toy_training import difference
from workflows.recipe.train import StageRecipe
from workflows.storage.folder import Folder
from workflows.train.checkpoint import CheckpointStore

SLOW = pytest.mark.slow
ZERO_STAGES = [pytest.param(0, marks=SLOW), 2, pytest.param(3, marks=SLOW)]
WHOLE = {"trains": ["vision", "connector", "language_model"]}


def moved(toy, outcome) -> set[str]:
    """The parts whose weights a stage has changed; every tensor must be there."""
    before, after = load_file(toy.initial / "model.safetensors"), outcome.weights
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@SLOW
@pytest.mark.parametrize(
    ("stage", "train"),
    [
        ({}, {"zero_stage": 2, "offload": "optimizer"}),
        ({}, {"zero_stage": 3, "offload": "parameters"}),
        ({}, {"activation_checkpointing": True}),
        ({"micro_batch_rows": 2}, {}),
    ],
)
def test_how_it_runs_does_not_change_what_comes_out(toy, workers, undisturbed, tmp_path, stage, train):
    outcome = workers.train(toy.job(tmp_path, stage, **train))
    assert outcome.losses == pytest.approx(undisturbed(2).losses, abs=1e-4)
    assert difference(outcome.weights, undisturbed(2).weights) < 2e-3


@SLOW
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_bf16_learns_and_keeps_its_weights_in_float32(toy, workers, undisturbed, tmp_path, zero_stage):
    outcome = workers.train(toy.job(tmp_path, precision="bf16", zero_stage=zero_stage))
    exact = undisturbed(2).losses
    assert outcome.losses != exact
    assert outcome.losses == pytest.approx(exact, abs=0.05)
    assert {value.dtype for name, value in outcome.weights.items() if "language_model" in name} == {torch.float32}


@SLOW
def test_the_language_model_alone(toy, workers, tmp_path):
    assert moved(toy, workers.train(toy.job(tmp_path, {"trains": ["language_model"]}))) == {"language_model"}


@SLOW
def test_every_part_has_its_own_learning_rate(toy, workers, tmp_path):
    """The encoder's is so small that it moves by no more than steps x rate, which Adam bounds."""
    stage = {**WHOLE, "learning_rates": {"vision": 1e-7}}
    outcome = workers.train(toy.job(tmp_path, stage))
    assert moved(toy, outcome) == {"vision", "connector", "language_model"}
    before = load_file(toy.initial / "model.safetensors")
    names = {name for name, _ in _parameters(toy) if name.startswith("vision.")}
    change = max((outcome.weights[name] - before[name]).abs().max().item() for name in names)
    assert 0 < change < 2e-6
    rates = outcome.of("metrics")[2]
    assert rates["learning_rate_vision"] == pytest.approx(rates["learning_rate"] * 1e-7 / 0.003)


def _parameters(toy):
    from mlmamba.modeling import MLMambaForConditionalGeneration

    return MLMambaForConditionalGeneration.from_pretrained(toy.initial).named_parameters()


@pytest.mark.parametrize("zero_stage", [2, pytest.param(3, marks=SLOW)])
def test_lora_is_merged_into_the_weights_that_it_adapts(toy, workers, tmp_path, zero_stage):
    stage = {"trains": ["language_model"], "lora": {"rank": 2}, "learning_rate": 0.03}
    outcome = workers.train(toy.job(tmp_path, stage, zero_stage=zero_stage))
    assert "language_model (" in outcome.of("start")[0]["text"]
    assert "in adapters on" in outcome.of("start")[0]["text"]
    before, after = load_file(toy.initial / "model.safetensors"), outcome.weights
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"language_model.backbone.layers.{i}.mixer.{p}_proj.weight" for i in (0, 1) for p in ("in", "out")
    }
    assert {torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4).item() for name in changed} == {2}
    assert outcome.losses[-1] < outcome.losses[0]
    again = workers.train(replace(toy.job(tmp_path / "next", {"steps": 1}), start_from=str(outcome.folder / "model")))
    assert again.losses[0] < outcome.losses[-1] + 0.2  # what was merged does what the adapters did


def test_the_held_out_loss_is_that_of_the_plain_model(toy, workers, tmp_path):
    """Counted over two workers and a last batch that is not full, against the model called by hand."""
    from mlmamba.loading import load_model
    from pipelines.reader import PackedDataset, collate

    outcome = workers.train(toy.job(tmp_path, {"steps": 2, "micro_batch_rows": 2}, validate_every=2, sample_every=2))
    dataset, (model, _) = PackedDataset(str(toy.data), "validation"), load_model(outcome.folder / "model")
    assert len(dataset) % 4  # else the test does not test what it says
    total, count = 0.0, 0
    for index in range(len(dataset)):
        batch = collate(dataset.rows([index]), dataset.manifest.max_tokens, 0, model.image_layout)
        labelled = int((batch["labels"] != -100).sum())
        total += model(**batch).loss.item() * labelled
        count += labelled
    assert outcome.of("validation")[-1]["loss"] == pytest.approx(total / count, abs=1e-4)
    rows = outcome.of("samples")[0]["rows"]
    assert len(rows) == 4
    assert {row["answer"] for row in rows} <= {"red", "green", "blue", "yes", "no"}
    assert all(row["question"].endswith("?") and isinstance(row["prediction"], str) for row in rows)


@SLOW
def test_samples_and_validation_do_not_change_the_training(toy, workers, undisturbed, tmp_path):
    outcome = workers.train(toy.job(tmp_path, validate_every=3, sample_every=4, samples=1, sample_tokens=2))
    assert outcome.losses == undisturbed(2).losses


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_a_loss_that_is_no_number_stops_the_stage_with_its_last_checkpoint_safe(toy, workers, tmp_path, zero_stage):
    job = toy.job(tmp_path, {"learning_rate": 1e15, "warmup": 0.0}, zero_stage=zero_stage, save_every=1, log_every=5)
    said = workers.train(job).result
    assert "stage full diverged at step 2 of 8" in said
    assert "nan" in said or "inf" in said
    assert "its checkpoint of step 1 is kept" in said
    assert "Lower the stage's learning_rate (now 1e+15), raise its warmup (now 0)" in said
    assert CheckpointStore(Folder(tmp_path / "checkpoints")).newest().step == 1
    assert not (tmp_path / "model").exists()


@SLOW
def test_a_loss_that_explodes_stops_the_stage(toy, workers, tmp_path):
    said = workers.train(
        toy.job(tmp_path, {"learning_rate": 1.0, "warmup": 0.0}, max_loss_rise=2.0, save_every=1)
    ).result
    assert "diverged at step" in said
    assert "the loss has risen to" in said
    assert "(train.max_loss_rise is 2)" in said


def test_a_disk_that_is_full_stops_the_stage_and_keeps_the_last_checkpoint(toy, workers, tmp_path):
    """The limit on the size of a file makes every write beyond it fail, as a full disk does."""
    job = toy.job(tmp_path, save_every=2)
    workers.train(job, stop_after=2)
    processes = workers.processes()
    for process in processes:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        said = workers.train(job).result
        no_model = workers.train(toy.job(tmp_path / "export", {"steps": 1})).result
    finally:
        for process in processes:
            resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "stage full: the checkpoint of step 4 could not be written to" in said
    assert "File too large" in said
    assert "the one of step 2 is whole. Make room there" in said
    assert [folder.name.split(".")[0] for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert f"stage full: its model could not be written to {tmp_path / 'export' / 'model'}" in no_model
    assert not list((tmp_path / "export").glob("*model*"))
    assert workers.train(job).of("start")[0]["step"] == 2


def test_lora_on_layers_that_are_not_there(toy, workers, tmp_path):
    said = workers.train(toy.job(tmp_path, {"lora": {"targets": "q_proj"}})).result
    assert "lora.targets = 'q_proj'" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": []}, "the stage trains nothing"),
        ({"learning_rates": {"vision": 1e-6}}, "learning_rates.vision is given, but trains does not name vision"),
        ({"learning_rates": {"connector": 0}}, "take connector out of trains"),
        ({"lora": {}, "trains": ["connector"]}, "add language_model to trains"),
    ],
)
def test_stages_that_make_no_sense(changes, message):
    fields = {"name": "s", "trains": ["connector"], "steps": 1, "learning_rate": 1.0, "batch_rows": 1}
    with pytest.raises(ValueError, match=message):
        StageRecipe(**fields | changes)
