"""Nodes of a Ray cluster of processes that are lost and come back while something trains on them."""

import os
import random
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from tests.helpers.processes import wait_for
from tests.helpers.ray_cluster import kill_tree
from workflows.runtime import quiet_libraries

_KILLED, _DRAINED, _TERMINATED = "killed", "drained", "terminated"
_DRAINING = 20.0  # seconds for a node to become idle after SIGTERM
_TRIES = 5  # a raylet ends itself when its agents take over 15 s to start, as they do on a busy machine


@contextmanager
def sky() -> Iterator[str]:
    """A head without a CPU, which is connected to; gives its address."""
    quiet_libraries()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


class SpotNode:
    """A node with one CPU: a `ray start --block` in a session of its own, as a machine's service or a container is."""

    def __init__(self, address: str):
        for _ in range(_TRIES):
            self._start(address)
            wait_for(lambda: self.id is not None or self._process.poll() is not None, 120)
            if self.id is not None:
                return
        raise RuntimeError(f"a node ended {_TRIES} times before it was there, last with {self._process.returncode}")

    def _start(self, address: str) -> None:
        self._name = secrets.token_hex(8)
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        options = [f"--address={address}", "--num-cpus=1", f"--labels=name={self._name}"]
        environment = {**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(_DRAINING)}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([*command, *options], env=environment, start_new_session=True, **quiet)

    @property
    def id(self) -> str | None:
        """Ray's, once it is there."""
        found = [node["NodeID"] for node in ray.nodes() if node["Labels"].get("name") == self._name and node["Alive"]]
        return found[0] if found else None

    def kill(self) -> None:
        """SIGKILL for all its processes at once."""
        kill_tree(self._process)

    def drain(self, seconds: float) -> None:
        """Say that it is going to be taken back, as `ray drain-node` does."""
        reason, deadline = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, int((time.time() + seconds) * 1000)
        client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
        accepted, why = client.drain_node(self.id, reason, "taken back", deadline)
        assert accepted, why

    def terminate(self) -> None:
        """SIGTERM for its first process, as a cloud's shutdown and Kubernetes send it."""
        self._process.terminate()


@dataclass
class Weather:
    """An event callback of a training that takes nodes away, and adds others.

    Attributes:
        address: of the cluster.
        losses: how many in all.
        within: a loss comes this many steps at most after training has begun on all nodes.
        back: seconds after a loss, at most, until another node comes.
        notice: seconds between a drain and the node's end.
        kinds: how they go, in turns: killed without a notice, drained and then killed, or terminated.
        workers: of each start of training.
        ends: how nodes went, as training noticed it.
        again: steps that were taken again at each new start, by why it was: how a node went, or "grown".
    """

    address: str
    nodes: int
    losses: int
    within: int = 20
    back: float = 20.0
    notice: float = 10.0
    kinds: tuple[str, ...] = (_KILLED, _DRAINED, _TERMINATED)
    seed: int = 0
    workers: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    again: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self):
        self._random = random.Random(self.seed)
        self._there = [SpotNode(self.address) for _ in range(self.nodes)]
        self._due: int | None = None
        self.step = 0
        self._timers: list[threading.Timer] = []

    def __call__(self, event: dict) -> None:
        if event["event"] == "start":
            self.workers.append(event["workers"])
            if len(self.workers) > 1:
                new = len(self.ends) < len(self.lost)
                self.ends += self.lost[len(self.ends) :][:1]
                how = self.ends[-1] if new else "grown"
                self.again.append((how, max(0, self.step - event["step"])))
            all_there = event["workers"] == self.nodes and len(self.lost) < self.losses
            self._due = event["step"] + self._random.randint(1, self.within) if all_there else None
        elif event["event"] == "metrics":
            self.step = event["step"]
            if self._due is not None and event["step"] >= self._due:
                self._due = None
                self._lose(self.kinds[len(self.lost) % len(self.kinds)])

    def _lose(self, how: str) -> None:
        node = self._there.pop(self._random.randrange(len(self._there)))
        self.lost.append(how)
        if how == _TERMINATED:
            node.terminate()
        elif how == _DRAINED:
            node.drain(self.notice)
        self._later(self.notice if how == _DRAINED else _DRAINING if how == _TERMINATED else 0.0, node.kill)
        self._later(self._random.random() * self.back, self._come)

    def _come(self) -> None:
        self._there.append(SpotNode(self.address))

    def _later(self, seconds: float, do) -> None:
        self._timers.append(threading.Timer(seconds, do))
        self._timers[-1].start()

    def settle(self) -> None:
        """End all nodes, when what is still to come has come."""
        for timer in self._timers:
            timer.join()
        for node in self._there:
            node.kill()
