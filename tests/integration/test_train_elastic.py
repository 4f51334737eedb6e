"""Nodes are lost in the training and others come: it goes on with what is there, and learns the same."""

import pytest

from tests.helpers.toy_stage import run_toy_stage, toy_recipe
from tests.helpers.toy_training import difference, make_toy
from tests.helpers.weather import Weather, sky
from workflows.train import trainer

pytestmark = pytest.mark.slow
STAGE = {"steps": 300, "batch_rows": 8}


def test_a_killed_node_and_two_that_are_taken_back_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_GROW", 2.0)
    with sky() as address:
        weather = Weather(address, nodes=2, losses=3, notice=20.0)
        toy = make_toy(tmp_path / "toy")
        whole = run_toy_stage(toy, tmp_path / "whole", toy_recipe(toy, STAGE, workers=2))
        recipe = toy_recipe(toy, STAGE, workers=[1, 2], save_every=20, max_failures=0)
        disturbed = run_toy_stage(toy, tmp_path / "disturbed", recipe, weather)
        weather.settle()
    assert weather.lost == ["killed", "drained", "terminated"]
    assert [event["kind"] for event in disturbed.of("failure")] == ["lost"] * 3
    assert not any(steps for how, steps in weather.again if how != "killed")  # none is taken again after a notice
    assert weather.workers[0] == 2
    losses = {event["step"]: event["loss"] for event in whole.of("metrics")}
    again = {event["step"]: event["loss"] for event in disturbed.of("metrics")}
    assert again == pytest.approx(losses, abs=1e-5)
    assert difference(disturbed.weights, whole.weights) < 1e-3
