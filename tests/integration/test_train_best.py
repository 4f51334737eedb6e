"""A stage that takes its best step: stopped, resumed, resharded, it takes the same one, and its weights are those."""

import json
import shutil

import pytest

from tests.helpers.toy_training import Workers, same

SLOW = pytest.mark.slow
ALL_STAGES = [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)]
# So high a rate that the score falls again, so that the best step is not the last.
STAGE = {"steps": 12, "learning_rate": 0.5, "warmup": 0.0, "best": {}}
EVERY = {"validate_every": 2, "max_loss_rise": None}


def best_of(outcome) -> int:
    """The step that the validation events say is best."""
    return max(outcome.of("validation"), key=lambda event: (event["score"], -event["loss"]))["step"]


@pytest.mark.parametrize("zero_stage", ALL_STAGES)
def test_the_exported_model_is_that_of_the_best_step(toy, workers, tmp_path, zero_stage):
    outcome = workers.train(toy.job(tmp_path / "whole", STAGE, zero_stage=zero_stage, **EVERY))
    step = best_of(outcome)
    assert step < 12  # else the test does not test what it says
    (said,) = outcome.of("best")
    assert said["step"] == step
    assert said["text"].startswith(f"takes step {step} of 12 (score ")
    assert json.loads((outcome.folder / "model" / "stage.json").read_text())["step"] == step
    # A stage that is stopped at that step has checkpoints of it; what goes on from there takes it as well.
    job = toy.job(tmp_path / "stopped", STAGE, zero_stage=zero_stage, save_every=3, **EVERY)
    workers.train(job, stop_after=10)
    resumed = workers.train(job)
    assert resumed.of("start")[0]["step"] == 9
    assert resumed.of("best") == outcome.of("best")
    assert same(resumed.weights, outcome.weights)
    plain = STAGE | {"best": None}
    last = workers.train(toy.job(tmp_path / "last", plain, zero_stage=zero_stage, **EVERY))
    assert not same(last.weights, outcome.weights)
    assert last.losses == outcome.losses  # choosing changes nothing of the steps


def test_patience_ends_a_stage_early_and_the_same_after_a_kill(toy, workers, tmp_path):
    stage = STAGE | {"best": {"patience": 1}}
    outcome = workers.train(toy.job(tmp_path / "whole", stage, **EVERY))
    (said,) = outcome.of("best")
    ended = outcome.of("metrics")[-1]["step"]
    assert ended == said["step"] + 2 < 12
    assert said["text"].endswith("stopped early, after 1 without a better one")
    job = toy.job(tmp_path / "stopped", stage, save_every=1, **EVERY)
    workers.train(job, stop_after=ended)  # all is done but the export
    resumed = workers.train(job)
    assert resumed.of("metrics") == []
    assert resumed.of("best") == outcome.of("best")
    assert same(resumed.weights, outcome.weights)


@SLOW
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_another_number_of_workers_takes_the_weights_that_were_kept(toy, workers, tmp_path, zero_stage):
    job = toy.job(tmp_path / "two", STAGE, zero_stage=zero_stage, save_every=2, **EVERY)
    outcome = workers.train(toy.job(tmp_path / "whole", STAGE, zero_stage=zero_stage, **EVERY))
    step = best_of(outcome)
    workers.train(job, stop_after=step + 2)
    alone = Workers(1)
    try:
        resumed = alone.train(toy.job(tmp_path / "two", STAGE, zero_stage=zero_stage, workers=1, **EVERY))
    finally:
        alone.close()
    assert resumed.of("start")[0]["step"] == step + 2
    assert resumed.of("best")[0]["step"] == step
    assert same(resumed.weights, outcome.weights)


@SLOW
def test_the_best_step_of_adapters_is_merged(toy, workers, tmp_path):
    stage = STAGE | {"trains": ["language_model"], "lora": {"rank": 2}, "best": {}}
    outcome = workers.train(toy.job(tmp_path / "whole", stage, **EVERY))
    (said,) = outcome.of("best")
    job = toy.job(tmp_path / "short", {**stage, "best": None}, save_every=said["step"], **EVERY)
    assert outcome.weights.keys() == workers.train(job).weights.keys()


def test_a_best_step_whose_weights_are_gone_is_forgotten(toy, workers, tmp_path):
    job = toy.job(tmp_path, STAGE, save_every=2, **EVERY)
    workers.train(job, stop_after=10)
    for file in (tmp_path / "checkpoints").glob("best-*"):
        file.unlink()
    (said,) = workers.train(job).of("best")
    assert said["step"] == 12
    shutil.rmtree(tmp_path / "checkpoints")


def test_the_score_is_that_of_answering_greedily(toy, workers, tmp_path):
    """Each question of the validation split asked of the plain model, after the right answers to those before it."""
    import torch

    from mlmamba.loading import load_model
    from pipelines.reader import PackedDataset, collate

    outcome = workers.train(toy.job(tmp_path, {"steps": 8, "learning_rate": 0.01}, validate_every=8))
    dataset, (model, _) = PackedDataset(str(toy.data), "validation"), load_model(outcome.folder / "model")
    right = answers = 0
    for index in range(len(dataset)):
        batch = collate(dataset.rows([index]), dataset.manifest.max_tokens, 0, model.image_layout)
        ids, labels, seq_idx = batch["input_ids"][0], batch["labels"][0], batch["seq_idx"][0]
        shown = 0
        for sample in range(int(seq_idx[-1])):
            places = (seq_idx == sample).nonzero()[:, 0]
            own, wanted = ids[places], labels[places]
            images = int((own == model.config.image_token_id).sum()) // model.connector.tokens(model.vision.grid)
            pixels = batch["pixel_values"][shown : shown + images]
            shown += images
            starts = ((wanted[1:] != -100) & (wanted[:-1] == -100)).nonzero()[:, 0] + 1
            for start in starts.tolist():
                length = int((torch.cat([wanted[start:], torch.tensor([-100])]) == -100).nonzero()[0])
                said = own[:start]
                for _ in range(length):
                    logits = model(input_ids=said[None], pixel_values=pixels if images else None).logits[0, -1]
                    logits[model.config.image_token_id] = -torch.inf
                    said = torch.cat([said, logits.argmax()[None]])
                right += bool(torch.equal(said[start:], own[start : start + length]))
                answers += 1
    assert 0 < right < answers  # else the test does not test what it says
    assert outcome.of("validation")[-1]["score"] == pytest.approx(right / answers)
