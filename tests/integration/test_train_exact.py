"""A stage that was stopped and goes on is the stage that was never stopped, to the last bit, on any ZeRO stage."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.toy_training import Workers, difference, make_toy, same
from workflows.storage.folder import WHOLE, Folder
from workflows.train.checkpoint import CheckpointStore

SLOW = pytest.mark.slow
ALL_STAGES = [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)]


@pytest.mark.parametrize("zero_stage", ALL_STAGES)
def test_stopped_and_resumed_it_is_the_same_to_the_last_bit(toy, workers, undisturbed, tmp_path, zero_stage):
    job = toy.job(tmp_path, zero_stage=zero_stage, save_every=2)
    first = workers.train(job, stop_after=5)
    assert first.result == "stopped"
    second = workers.train(job)
    assert second.of("start")[0]["step"] == 4
    whole = undisturbed(zero_stage)
    assert first.losses[:4] + second.losses == whole.losses
    assert [event["learning_rate"] for event in second.of("metrics")] == [
        event["learning_rate"] for event in whole.of("metrics")[4:]
    ]
    assert same(second.weights, whole.weights)


@SLOW
def test_every_zero_stage_gives_the_same_losses(undisturbed):
    for zero_stage in (1, 2, 3):
        assert undisturbed(zero_stage).losses == pytest.approx(undisturbed(0).losses, abs=1e-5)


@SLOW
def test_every_export_holds_every_tensor(toy, undisturbed):
    before = load_file(toy.initial / "model.safetensors")
    for zero_stage in range(4):
        after = undisturbed(zero_stage).weights
        assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in before.items()}
        moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"connector", "language_model"}


@SLOW
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_dropout_changed_images_and_weights_of_answers_resume_exactly_too(
    toy, workers, undisturbed, tmp_path, zero_stage
):
    stage = {
        "lora": {"rank": 2, "dropout": 0.5},
        "augment": {"crop": 0.5, "flip": True, "colour": 0.2},
        "dropout": 0.3,
        "balance_answers": 0.5,
    }
    whole = workers.train(toy.job(tmp_path / "whole", stage, zero_stage=zero_stage))
    job = toy.job(tmp_path / "stopped", stage, zero_stage=zero_stage, save_every=3)
    workers.train(job, stop_after=4)
    assert same(workers.train(job).weights, whole.weights)
    for change in ({"dropout": 0.3}, {"balance_answers": 1.0}):
        changed = workers.train(toy.job(tmp_path / str(change), change | {"steps": 2}, zero_stage=zero_stage))
        assert changed.losses[0] != undisturbed(zero_stage).losses[0]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A toy whose language model has attention and MLPs."""
    text = {
        "layers": ["mamba2", "mlp", "attention", "mlp", "both"],
        "hidden_size": 32,
        "state_size": 8,
        "head_dim": 16,
        "chunk_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_head_dim": 8,
        "rope_theta": 1e4,
        "mlp_size": 48,
    }
    return make_toy(tmp_path_factory.mktemp("hybrid"), {"text": text})


@pytest.mark.parametrize("zero_stage", [2, pytest.param(3, marks=SLOW)])
def test_a_hybrid_resumes_exactly_and_every_mixer_of_it_trains(hybrid, workers, tmp_path, zero_stage):
    whole = workers.train(hybrid.job(tmp_path / "whole", zero_stage=zero_stage))
    job = hybrid.job(tmp_path / "stopped", zero_stage=zero_stage, save_every=2)
    first = workers.train(job, stop_after=5)
    second = workers.train(job)
    assert second.of("start")[0]["step"] == 4
    assert first.losses[:4] + second.losses == whole.losses
    assert same(second.weights, whole.weights)
    before = load_file(hybrid.initial / "model.safetensors")
    moved = {
        name.split(".")[3] for name in before if "layers" in name and not torch.equal(before[name], whole.weights[name])
    }
    assert moved >= set("01234")


@SLOW
def test_a_hybrid_has_the_same_losses_under_every_zero_stage(hybrid, workers, tmp_path):
    found = [workers.train(hybrid.job(tmp_path / str(stage), zero_stage=stage)).losses for stage in (0, 1, 3)]
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


def test_half_written_and_damaged_checkpoints_are_passed_over(toy, workers, undisturbed, tmp_path):
    job = toy.job(tmp_path, save_every=2)
    workers.train(job, stop_after=6)
    root = tmp_path / "checkpoints"
    store = CheckpointStore(Folder(root))
    assert [checkpoint.step for checkpoint in store.whole()] == [4, 6]
    damaged, safe = store.newest().folder, store.whole()[0].folder
    (file, *_) = damaged.glob("*optim_states.pt")
    file.write_bytes(file.read_bytes()[:100])
    unfinished = root / "step-00000007.dead"
    shutil.copytree(safe, unfinished)
    (unfinished / WHOLE).unlink()
    resumed = workers.train(job)
    assert resumed.of("start")[0]["step"] == 4
    assert same(resumed.weights, undisturbed(2).weights)
    assert not unfinished.exists()


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_checkpoint_with_a_flipped_bit_is_passed_over_and_said(toy, workers, undisturbed, tmp_path, damaged):
    """One rank's file alone: all ranks take the older one, or begin anew where that is damaged, too."""
    job = toy.job(tmp_path, save_every=2)
    workers.train(job, stop_after=6)
    for checkpoint in CheckpointStore(Folder(tmp_path / "checkpoints")).whole()[-damaged:]:
        file = max(checkpoint.folder.glob("*rank_1*optim_states.pt"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x40
        file.write_bytes(content)
    resumed = workers.train(job)
    assert len(resumed.of("damaged")) == damaged
    assert "is damaged and passed over: " in resumed.of("damaged")[0]["text"]
    assert resumed.of("start")[0]["step"] == (4 if damaged == 1 else 0)
    assert same(resumed.weights, undisturbed(2).weights)


def test_a_checkpoint_of_version_0_1_is_gone_on_from(toy, workers, undisturbed, tmp_path):
    """It has no attempt in its name; beside it lies what was half written then."""
    job, root = toy.job(tmp_path, save_every=2), tmp_path / "checkpoints"
    workers.train(job, stop_after=4)
    CheckpointStore(Folder(root)).newest().folder.rename(root / "step-00000004")
    shutil.copytree(root / "step-00000004", root / ".step-00000006.dead")
    resumed = workers.train(job)
    assert resumed.of("start")[0]["step"] == 4
    assert same(resumed.weights, undisturbed(2).weights)
    assert not (root / ".step-00000006.dead").exists()


@SLOW
def test_only_so_many_checkpoints_are_kept(toy, workers, tmp_path):
    workers.train(toy.job(tmp_path, save_every=1, keep_checkpoints=3), stop_after=6)
    assert sorted(folder.name.split(".")[0] for folder in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000005",
        "step-00000006",
    ]


@pytest.fixture(scope="module")
def alone():
    """One worker by itself."""
    group = Workers(1)
    yield group
    group.close()


@SLOW
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_another_number_of_workers_goes_on_with_the_optimizer_as_it_was(
    toy, workers, alone, undisturbed, tmp_path, zero_stage
):
    """Two workers, then one, then two again. Sums are taken in another order, so it is the same but for rounding;
    with a fresh optimizer the weights would differ by about the learning rate."""
    two = toy.job(tmp_path, zero_stage=zero_stage, save_every=2)
    one = toy.job(tmp_path, zero_stage=zero_stage, save_every=2, workers=1)
    workers.train(two, stop_after=2)
    middle = alone.train(one, stop_after=4)
    assert middle.of("start")[0]["step"] == 2
    assert middle.of("start")[0]["resharded_from"] == (2 if zero_stage else None)
    last = workers.train(two)
    assert last.of("start")[0]["step"] == 4
    assert middle.losses + last.losses == pytest.approx(undisturbed(zero_stage).losses[2:], abs=1e-5)
    assert difference(last.weights, undisturbed(zero_stage).weights) < 2e-4


def test_a_checkpoint_of_another_model_is_refused(toy, workers, tmp_path):
    workers.train(toy.job(tmp_path, save_every=2), stop_after=2)
    said = workers.train(toy.job(tmp_path, {"trains": ["connector"]})).result
    assert "is of another model" in said
    assert f"delete {tmp_path / 'checkpoints'}" in said
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert json.loads((kept / WHOLE).read_text())["step"] == 2
