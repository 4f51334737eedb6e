"""Stages that keep the features of their frozen encoder learn what stages that compute them each time learn."""

import pytest

from tests.helpers.toy_training import Workers, difference, same

SLOW = pytest.mark.slow
KEPT = {"keep_features": "always"}


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=SLOW), 2, pytest.param(3, marks=SLOW)])
def test_the_same_losses_but_for_rounding_and_the_same_bits_after_a_stop(
    toy, workers, undisturbed, tmp_path, zero_stage
):
    whole = workers.train(toy.job(tmp_path / "whole", KEPT, zero_stage=zero_stage, validate_every=4))
    plain = undisturbed(zero_stage)
    assert whole.losses == pytest.approx(plain.losses, abs=1e-5)
    assert difference(whole.weights, plain.weights) < 1e-3
    assert whole.weights.keys() == plain.weights.keys()  # the encoder's among them
    assert any("features of" in event["text"] for event in whole.of("note"))
    job = toy.job(tmp_path / "stopped", KEPT, zero_stage=zero_stage, save_every=2, validate_every=4)
    workers.train(job, stop_after=5)
    resumed = workers.train(job)
    assert resumed.of("start")[0]["step"] == 4
    assert same(resumed.weights, whole.weights)


@SLOW
def test_another_number_of_workers_uses_what_is_there(toy, workers, tmp_path):
    two = workers.train(toy.job(tmp_path / "two", KEPT))
    alone = Workers(1)
    try:
        one = alone.train(toy.job(tmp_path / "one", KEPT, workers=1))
    finally:
        alone.close()
    assert any("are there" in event["text"] for event in one.of("note"))
    assert one.losses == pytest.approx(two.losses, abs=1e-5)


@SLOW
def test_bf16_learns_the_same(toy, workers, tmp_path):
    found = [workers.train(toy.job(tmp_path / str(len(kept)), kept, precision="bf16")).losses for kept in ({}, KEPT)]
    assert found[1] == pytest.approx(found[0], abs=0.02)
