"""Which budget of restarts a failure costs: errors as Ray makes them, and a cluster's nodes as it would list them."""

from dataclasses import dataclass

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from workflows.train import lost_nodes
from workflows.train.entry import MoreRoom, NodeTakenBack, make_room
from workflows.train.lost_nodes import OnNodesThatStay, Restarts

AGAIN, END = FailureDecision.RETRY, FailureDecision.RAISE
BROKEN = RuntimeError("Connection closed by peer")


@dataclass
class Worker:
    told: int = 0

    def execute_async(self, function) -> None:
        assert function is make_room
        self.told += 1


@dataclass
class Group:
    workers: list[Worker]
    start_time: float = float("-inf")

    @property
    def num_workers(self) -> int:
        return len(self.workers)


class Cluster:
    """Nodes, a desk, and what Ray says of them."""

    def __init__(self, monkeypatch):
        self.nodes = {"a": True, "b": True}
        self.draining: set[str] = set()
        self.job, self.events = 1, []
        monkeypatch.setattr(lost_nodes.ray, "nodes", lambda: [
            {"NodeID": name, "Alive": alive} for name, alive in self.nodes.items()
        ])  # fmt: skip
        monkeypatch.setattr(lost_nodes, "_NOTICED", 0.05)
        monkeypatch.setattr(lost_nodes.ray, "get", lambda value: value)
        monkeypatch.setattr(lost_nodes, "_draining", lambda: set(self.draining))
        monkeypatch.setattr(lost_nodes.time, "sleep", self.wait)
        self.after_waiting = lambda: None

    number = add = property(lambda self: self)

    def remote(self, event=None):
        if event is None:
            return self.job
        return self.events.append(event)

    def wait(self, seconds: float) -> None:
        self.after_waiting()

    @property
    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


def failed(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("workers failed", dict(enumerate(errors)))


def died(preempted: bool = False) -> Exception:
    error = ActorDiedError()
    error._preempted = preempted
    return WorkerHealthCheckFailedError("no answer", error)


def taken_back() -> PreemptionError:
    return PreemptionError(PreemptionInfo(None, {"b": [1]}), True)


def test_workers_that_fail_have_their_budget(cluster):
    policy = Restarts(cluster, failures=2, lost=9)
    assert [policy.make_decision(failed(BROKEN)) for _ in range(3)] == [AGAIN, AGAIN, END]
    assert cluster.kinds == ["failure"] * 3
    assert cluster.events[0]["text"] == "worker 0 failed: RuntimeError: Connection closed by peer"
    assert [event["spent"] for event in cluster.events] == [False, False, True]


@pytest.mark.parametrize(
    "error", [taken_back(), failed(BROKEN, NodeTakenBack("after step 3")), failed(BROKEN, died(preempted=True))]
)
def test_a_node_that_is_taken_back_costs_no_failure(cluster, error):
    policy = Restarts(cluster, failures=0, lost=2)
    assert [policy.make_decision(error) for _ in range(3)] == [AGAIN, AGAIN, END]
    assert cluster.kinds == ["lost"] * 3


def test_a_node_that_died_explains_its_neighbours_errors(cluster):
    policy = Restarts(cluster, failures=1, lost=5)
    cluster.nodes["b"] = False
    assert policy.make_decision(failed(BROKEN)) == AGAIN
    assert policy.make_decision(failed(BROKEN)) == AGAIN
    assert policy.make_decision(failed(BROKEN)) == END
    assert cluster.kinds == ["lost", "failure", "failure"]
    assert cluster.events[0]["text"].startswith("a node is lost (worker 0 failed: ")


def test_where_no_failure_is_allowed_a_nodes_death_is_waited_for(cluster):
    policy = Restarts(cluster, failures=0, lost=5)
    cluster.after_waiting = lambda: cluster.nodes.update(b=False)
    assert policy.make_decision(failed(BROKEN)) == AGAIN
    assert cluster.kinds == ["lost"]


def test_a_failure_is_counted_over_when_a_nodes_death_explains_it_later(cluster):
    policy = Restarts(cluster, failures=1, lost=2)
    assert policy.make_decision(failed(BROKEN)) == AGAIN
    cluster.nodes["b"] = False
    assert policy.make_decision(failed(died())) == AGAIN
    cluster.nodes = {"a": True}  # one machine: nothing to wait for
    assert [policy.make_decision(failed(BROKEN)) for _ in range(2)] == [AGAIN, END]


def test_nodes_that_were_dead_or_left_before_explain_nothing(cluster):
    cluster.nodes["b"], cluster.draining = False, {"c"}
    policy = Restarts(cluster, failures=1, lost=5)
    assert policy.make_decision(failed(BROKEN)) == AGAIN
    assert cluster.kinds == ["failure"]


def test_every_job_has_its_own_budget(cluster):
    policy = Restarts(cluster, failures=1, lost=0)
    assert policy.make_decision(failed(BROKEN)) == AGAIN
    cluster.job = 2
    assert policy.make_decision(failed(BROKEN)) == AGAIN


def test_a_group_that_finds_no_room_is_tried_again_and_one_that_cannot_start_has_a_budget(cluster):
    policy = Restarts(cluster, failures=1, lost=0)
    assert policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2))) == AGAIN
    assert cluster.events == []
    broken = ControllerError(ValueError("the port is taken"))
    assert [policy.make_decision(broken) for _ in range(2)] == [AGAIN, END]
    assert cluster.events[0]["text"] == "the start of workers failed: ValueError: the port is taken"


def test_workers_that_leave_for_a_larger_group_cost_no_restart(cluster):
    policy = Restarts(cluster, failures=0, lost=0)
    assert policy.make_decision(failed(MoreRoom("after step 3"), MoreRoom("after step 3"))) == AGAIN
    assert cluster.events == []


def test_a_group_that_runs_is_told_of_room_and_leaves_by_itself(cluster):
    from ray.train import ScalingConfig

    policy = OnNodesThatStay(ScalingConfig(num_workers=(1, 3), resources_per_worker={"CPU": 1}))
    policy._maybe_send_resource_request = lambda: None
    policy._get_reserved_resources = lambda: {"a": {"CPU": 2.0}, "b": {"CPU": 1.0}}
    group = Group([Worker(), Worker()])
    for draining, told in (({"a"}, 0), (set(), 1)):
        cluster.draining, policy._latest_monitor_time = draining, float("-inf")
        assert isinstance(policy.make_decision_for_running_worker_group(group, None), NoopDecision)
        assert [worker.told for worker in group.workers] == [told, told]


def test_no_worker_is_counted_on_a_node_that_is_drained_or_dead(cluster):
    from ray.train import ScalingConfig

    policy = OnNodesThatStay(ScalingConfig(num_workers=(1, 3), resources_per_worker={"CPU": 1}))
    room = {"a": {"CPU": 1.0}, "b": {"CPU": 2.0}}
    assert policy._count_possible_workers(room) == 3
    cluster.draining = {"b"}
    assert policy._count_possible_workers(room) == 1
    cluster.nodes["a"] = False
    assert policy._count_possible_workers(room) == 0
