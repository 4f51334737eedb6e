"""What is refused before training starts, when a loss counts as diverged, and what makes a stage another one."""

from types import SimpleNamespace

import pytest

from workflows.errors import WorkflowError
from workflows.preflight import check_fit, check_stages
from workflows.recipe.load import load_recipe
from workflows.recipe.schema import Recipe
from workflows.storage.layout import run_name
from workflows.train.step import LossWatch
from workflows.train.trainer import stage_digest

DIGESTS = {"connector": "a", "full": "b"}


def quickstart(*changes: str) -> Recipe:
    return load_recipe("quickstart", list(changes))


def manifests(rows: int = 100, validation: bool = True) -> dict:
    """Only what the check reads of a manifest."""
    splits = {"train": SimpleNamespace(rows=rows)} | ({"validation": SimpleNamespace(rows=5)} if validation else {})
    return {name: SimpleNamespace(splits=splits) for name in DIGESTS}


def test_more_workers_than_the_cluster_has_cores():
    nodes = [{"CPU": 2.0}, {"CPU": 1.0}]
    check_fit(quickstart("train.workers=1").train, nodes)
    changes = ("train.workers=4", "train.stages.0.batch_rows=8", "train.stages.1.batch_rows=8")
    with pytest.raises(WorkflowError, match="training wants 4 workers x 1 CPU, the cluster has 3 CPU"):
        check_fit(quickstart(*changes).train, nodes)
    with pytest.raises(WorkflowError, match="training wants 2 workers x 1 GPU, the cluster has 0 GPU"):
        check_fit(quickstart("train.gpus_per_worker=1").train, nodes)


def test_a_worker_that_no_single_node_can_hold():
    wide = quickstart("train.cpus_per_worker=2").train
    check_fit(wide, [{"CPU": 2.0}, {"CPU": 2.0}])
    with pytest.raises(WorkflowError, match="2 workers with 2 CPU each, the cluster's 2 nodes hold 1 of them"):
        check_fit(wide, [{"CPU": 3.0}, {"CPU": 1.0}])
    apart = quickstart("train.workers=1", "train.gpus_per_worker=1").train
    with pytest.raises(WorkflowError, match="1 workers with 1 CPU and 1 GPU each, the cluster's 2 nodes hold 0"):
        check_fit(apart, [{"CPU": 8.0}, {"GPU": 1.0}])


def test_a_data_set_smaller_than_a_batch():
    check_stages(quickstart(), manifests(rows=4))
    with pytest.raises(WorkflowError, match="stage connector: one step takes 4 packed rows, its data set has 3"):
        check_stages(quickstart(), manifests(rows=3))


@pytest.mark.parametrize("field", ["validate_every", "sample_every"])
def test_what_needs_a_validation_split_says_so(field):
    check_stages(quickstart(f"train.{field}=10"), manifests())
    with pytest.raises(WorkflowError, match=f"train.{field} is set, but the data of stage connector has no validation"):
        check_stages(quickstart(f"train.{field}=10"), manifests(validation=False))


@pytest.mark.parametrize(
    "change",
    [
        "train.save_every=7",
        "train.log_every=7",
        "train.keep_checkpoints=7",
        "train.max_failures=7",
        "train.workers=1",
        "train.cpus_per_worker=2",
        "train.validate_every=7",
        "train.sample_every=7",
        "train.activation_checkpointing=true",
    ],
)
def test_how_a_stage_is_run_does_not_make_it_another(change):
    assert stage_digest(quickstart(change), 1, DIGESTS) == stage_digest(quickstart(), 1, DIGESTS)
    assert run_name(quickstart(change)) == run_name(quickstart())


@pytest.mark.parametrize(
    "change",
    [
        "train.zero_stage=3",
        "train.precision=bf16",
        "train.stages.0.learning_rate=0.5",
        "train.stages.1.learning_rates={connector: 0.5}",
        "train.stages.1.lora={rank: 2}",
        "seed=8",
        "model.text.chunk_size=64",
    ],
)
def test_what_decides_the_weights_makes_it_another(change):
    assert stage_digest(quickstart(change), 1, DIGESTS) != stage_digest(quickstart(), 1, DIGESTS)
    assert run_name(quickstart(change)) != run_name(quickstart())


def test_a_later_stage_does_not_make_an_earlier_one_another():
    changed = quickstart("train.stages.1.learning_rate=0.5")
    assert stage_digest(changed, 0, DIGESTS) == stage_digest(quickstart(), 0, DIGESTS)
    assert stage_digest(quickstart(), 0, DIGESTS | {"connector": "c"}) != stage_digest(quickstart(), 0, DIGESTS)


def test_a_loss_diverges_when_it_is_no_number_or_has_risen_too_far():
    watch = LossWatch(3.0)
    assert [watch.diverged(loss) for loss in (5.0, 2.0, 4.9, 1.0)] == [""] * 4
    assert "nan" in watch.diverged(float("nan"))
    assert "inf" in watch.diverged(float("inf"))
    assert watch.diverged(4.1) == "the loss has risen to 4.100 from 1.000 (train.max_loss_rise is 3)"
    assert watch.lowest == 1.0


def test_a_resumed_watch_remembers_and_one_without_a_limit_lets_it_rise():
    assert LossWatch(3.0, lowest=1.0).diverged(4.1)
    assert not LossWatch(None, lowest=1.0).diverged(100.0)
    assert LossWatch(None).diverged(float("nan"))
