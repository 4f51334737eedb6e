"""A node is lost in the training and another comes: it goes on with what is there, and learns the same."""

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.helpers.toy_stage import run_toy_stage, toy_recipe
from tests.helpers.toy_training import difference, make_toy
from workflows.train import trainer

pytestmark = pytest.mark.slow
STEPS, LOST, BACK = 1200, 100, 300


@pytest.fixture(scope="module")
def cluster():
    """A head with one CPU, where the driver is; the tests add nodes of one CPU."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


class Weather:
    """Takes a node away at one step and brings one back at another."""

    def __init__(self, cluster: Cluster):
        self.cluster, self.node = cluster, cluster.add_node(num_cpus=1)
        self.workers: list[int] = []

    def __call__(self, event: dict) -> None:
        if event["event"] == "note" and "workers are there" in event["text"]:
            self.workers.append(int(event["text"].split()[0]))
        if event["event"] != "metrics":
            return
        if self.node is not None and len(self.workers) == 1 and event["step"] >= LOST:
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.node = None
        elif self.node is None and len(self.workers) == 2 and event["step"] >= BACK:
            self.node = self.cluster.add_node(num_cpus=1)


def test_a_lost_node_and_a_new_one_change_nothing(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_GROW", 2.0)
    toy = make_toy(tmp_path / "toy")
    stage = {"steps": STEPS, "batch_rows": 2}
    whole = run_toy_stage(toy, tmp_path / "whole", toy_recipe(toy, stage, workers=1, log_every=10))
    weather = Weather(cluster)
    recipe = toy_recipe(toy, stage, workers=[1, 2], save_every=20, log_every=10, max_failures=2)
    disturbed = run_toy_stage(toy, tmp_path / "disturbed", recipe, weather)
    assert weather.workers == [2, 1, 2]
    losses = {event["step"]: event["loss"] for event in whole.of("metrics")}
    again = {event["step"]: event["loss"] for event in disturbed.of("metrics")}
    assert again == pytest.approx(losses, abs=1e-5)
    assert difference(disturbed.weights, whole.weights) < 1e-3
