"""Workers killed under the real Ray Train: it starts them again, and the weights are those of the undisturbed run."""

import pytest

from tests.benchmarks.drills.train_faults import Killer
from tests.helpers.toy_stage import run_toy_stage, toy_recipe
from tests.helpers.toy_training import make_toy, same
from workflows.errors import WorkflowError

pytestmark = [pytest.mark.usefixtures("two_cpus"), pytest.mark.slow]


@pytest.fixture(scope="module")
def here(two_cpus, tmp_path_factory):
    """The toy, made with this module's Ray."""
    return make_toy(tmp_path_factory.mktemp("toy"))


def test_two_killed_workers_cost_steps_but_change_nothing(here, tmp_path):
    recipe = toy_recipe(here, {"steps": 40, "batch_rows": 2}, save_every=3, max_failures=4)
    whole = run_toy_stage(here, tmp_path / "whole", recipe)
    killer = Killer(kills=2, within=8, seed=1)
    disturbed = run_toy_stage(here, tmp_path / "disturbed", recipe, killer)
    assert len(killer.done) == 2
    assert len(disturbed.of("start")) == 3
    assert any(event["step"] > 0 for event in disturbed.of("start"))
    assert len(disturbed.of("failure")) >= 2
    losses = {event["step"]: event["loss"] for event in whole.of("metrics")}
    assert all(event["loss"] == losses[event["step"]] for event in disturbed.of("metrics"))
    assert same(disturbed.weights, whole.weights)
    assert not list((tmp_path / "disturbed" / "checkpoints").iterdir())


def test_more_deaths_than_allowed_end_the_stage_and_leave_its_checkpoint_for_the_next_run(here, tmp_path):
    recipe = toy_recipe(here, {"steps": 40, "batch_rows": 2}, save_every=2, max_failures=0)
    with pytest.raises(WorkflowError, match="stage full failed: "):
        run_toy_stage(here, tmp_path, recipe, Killer(kills=1, within=10, seed=0))
    (folder,) = (tmp_path / "checkpoints").glob("full-*")
    assert list(folder.glob("step-*"))
    assert run_toy_stage(here, tmp_path, recipe).of("start")[0]["step"] > 0


def test_a_stage_that_diverged_is_not_tried_again(here, tmp_path):
    events = []
    recipe = toy_recipe(here, {"learning_rate": 1e15, "warmup": 0.0}, save_every=1, max_failures=3)
    with pytest.raises(WorkflowError, match=r"stage full diverged at step 2 of 8.*its checkpoint of step 1 is kept"):
        run_toy_stage(here, tmp_path, recipe, events.append)
    assert len([event for event in events if event["event"] == "start"]) == 1


def test_a_flipped_bit_in_a_shard_is_not_trained_on(here, tmp_path):
    events, recipe = [], toy_recipe(here, {"steps": 8}, max_failures=0)
    shard = next((here.data / "shards").glob("train-*"))
    good = shard.read_bytes()
    shard.write_bytes(good[:2000] + bytes([good[2000] ^ 1]) + good[2001:])
    try:
        with pytest.raises(WorkflowError, match=rf"stage full failed: .*{shard.name} has other content.*run again"):
            run_toy_stage(here, tmp_path, recipe, events.append)
    finally:
        shard.write_bytes(good)
    assert "are compared with their sha256" in " ".join(e["text"] for e in events if e["event"] == "note")
    assert not [event for event in events if event["event"] == "metrics"]
