"""Nodes that come and go in the midst of training: what Ray Train's controller makes of it.

A cloud takes a spot instance back with a notice of 30 s to 2 min. Whoever hears it drains the node (`ray drain-node`,
or Ray's autoscaler), and Ray Train tells every worker. The workers then write a checkpoint at the end of the step that
they are at, and raise NodeTakenBack, so that no step is lost. A node that is gone without a notice costs the steps
since the last checkpoint. Either costs a restart of its own kind, not one of those for workers that fail. Where there
is room for more workers those that train leave in the same way, and a larger group takes over.

Light on imports, as entry.py, and for the same reason.
"""

import time
from collections import Counter

import ray
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError

from workflows.train.entry import MoreRoom, NodeTakenBack, make_room

_NOTICED = 45.0  # seconds in which Ray notices at the latest that a node is gone, after the first errors of its going
BUDGETS = {"failure": "train.max_failures", "lost": "train.max_lost_nodes"}


class Restarts(FailurePolicy):
    """Ray Train's failure policy: how often workers start again, counted for each job of the Desk.

    Args:
        desk: is told of every failure.
        failures: restarts after workers failed.
        lost: restarts after nodes were lost or taken back.
    """

    def __init__(self, desk, failures: int, lost: int):
        super().__init__(FailureConfig())
        self._desk, self._allowed = desk, {"failure": failures, "lost": lost}
        self._job, self._counts, self._unexplained = 0, Counter(), 0
        self._known = gone()

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Called in the controller, once for each failure of a group."""
        error = training_failed_error
        if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            return FailureDecision.RETRY  # no room for a group yet: it is looked for again
        if all(isinstance(one, MoreRoom) for one in _causes(error).values()):
            return FailureDecision.RETRY
        job = ray.get(self._desk.number.remote())
        if job != self._job:
            self._job, self._counts, self._unexplained = job, Counter(), 0
        kind = self._kind(error)
        self._counts[kind] += 1
        spent = self._counts[kind] > self._allowed[kind]
        event = {"event": "failure", "kind": kind, "spent": spent, "text": described(error, kind)}
        ray.get(self._desk.add.remote(event))
        return FailureDecision.RAISE if spent else FailureDecision.RETRY

    def _kind(self, error: TrainingFailedError) -> str:
        """Whether it comes from a lost node, as far as can be told.

        A node's going is first seen as errors of its neighbours, whose connections break. So a failure that nothing
        explains is counted as one of workers, and counted over when a node is found gone later; where no more failures
        are allowed, that is waited for.
        """
        known = self._known
        if isinstance(error, PreemptionError) or any(map(_is_taken_back, _causes(error).values())):
            self._known = known | gone()
            return "lost"
        spent = self._counts["failure"] >= self._allowed["failure"]
        until = time.monotonic() + (_NOTICED if spent and len(ray.nodes()) > 1 else 0.0)
        while True:
            if gone() - known:
                self._known = known | gone()
                self._counts["failure"] -= self._unexplained
                self._counts["lost"] += self._unexplained
                self._unexplained = 0
                return "lost"
            if time.monotonic() >= until:
                self._unexplained += 1
                return "failure"
            time.sleep(1.0)


class OnNodesThatStay(ElasticScalingPolicy):
    """Ray Train's elastic policy, without the nodes that are being drained, where no worker is put, and those that are
    dead, which Ray Train goes on counting on for 20 s. The group would wait for room there for a minute."""

    def make_decision_for_running_worker_group(self, worker_group_state, worker_group_status):
        """Nothing is done to a group that runs: it leaves by itself, behind a checkpoint, a drained node or, when it is
        told that there is room for more, its own."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if getattr(decision, "num_workers", 0) > worker_group_state.num_workers:
            for worker in worker_group_state.workers:
                worker.execute_async(make_room)
        return NoopDecision()

    def _count_possible_workers(self, reserved_resources) -> int:
        without = gone()
        return super()._count_possible_workers({k: v for k, v in reserved_resources.items() if k not in without})


def gone() -> set[str]:
    """The ids of nodes that are dead or being drained."""
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]} | _draining()


def described(error: TrainingFailedError, kind: str) -> str:
    """A failure in one line: which worker, and its error's last line; or that a node was lost."""
    causes = _causes(error)
    if isinstance(error, PreemptionError) or any(isinstance(one, NodeTakenBack) for one in causes.values()):
        return "a node is taken back, training goes on without it"
    who, cause = next(iter(causes.items()))
    lines = [line for line in str(cause).strip().splitlines() if line.strip()] or [""]
    text = f"{who} failed: {type(cause).__name__}: {lines[-1].strip()[:200]}"
    return f"a node is lost ({text})" if kind == "lost" else text


def _causes(error: TrainingFailedError) -> dict[str, Exception]:
    """What failed by who did; that workers could not be started is an error of the controller."""
    failures = getattr(error, "worker_failures", None) or {}
    if isinstance(error, ControllerError):
        return {"the start of workers": error.controller_failure}
    return {f"worker {rank}": cause for rank, cause in failures.items()} or {"a worker": error}


def _is_taken_back(error: Exception) -> bool:
    return isinstance(error, NodeTakenBack) or _is_preempted_actor(error)


def _draining() -> set[str]:
    return set(ray._private.state.state.get_draining_nodes())
