"""The fault drill: a whole workflow on a Ray cluster whose nodes and whose client are killed on the way.

    python -m tests.benchmarks.drills.cluster_drill --rounds 3

One head and three workers with a CPU each, as processes of this machine. The toy workflow (prepare, train two stages on
two nodes, evaluate, register, promote) is submitted once undisturbed. Then, on a storage of its own each round, the
same with SIGKILL for: a worker node that is at work on the preparation, with all its processes; the client that
submitted; a worker node that is at work on the training, after its first checkpoint. The second node is replaced, as a
pool of fixed size does it; the first is not. A round passes when the workflow ends in a promoted model without being
submitted again, with the data digest and, to the last bit, the weights of the undisturbed run.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mlflow.tracking import MlflowClient

from tests.helpers.ray_cluster import RayCluster, lines_until
from tests.helpers.toy_workflow import recipe, write_corpus, write_recipe

WORKERS = 3
_TIMEOUT = 1200  # seconds after which a workflow counts as one that does not end
_TASK, _TRAINING = "ray::Map", "RayTrainWorker"  # in the titles of worker processes at work


@dataclass(frozen=True)
class Outcome:
    """What one workflow ended in."""

    digest: str
    """Of the data."""
    weights: str
    """SHA-256 of the last stage's weights."""
    promoted: bool
    """The registry's alias names the version of this run."""
    seconds: float
    went_on: list[str] = field(default_factory=list)
    """Lines in which training says from where it went on."""
    moments: dict[str, float] = field(default_factory=dict)
    """Seconds after the submission, by what happened."""


class Drill:
    """Runs the toy workflow on a cluster, with and without kills."""

    def __init__(self, cluster: RayCluster, root: Path, records: int = 480, steps: int = 120):
        self._cluster, self._root = cluster, root
        write_corpus(root, count=records)
        content = recipe(root, name="drill")
        content["data"]["partition_records"] = max(records // 60, 1)  # some seconds of work on every node
        content["train"]["stages"][1]["steps"] = steps
        self._recipe = write_recipe(root / "drill.yaml", content)

    def undisturbed(self) -> Outcome:
        """The workflow without any kill."""
        storage, start = self._root / "undisturbed", time.monotonic()
        done = self._cluster.submitted(self._recipe, "--storage", storage, "--json", timeout=_TIMEOUT)
        assert done.returncode == 0, done.stderr
        return _outcome(json.loads(done.stdout), storage, time.monotonic() - start)

    def disturbed(self, name: str) -> Outcome:
        """The workflow with the three kills. The cluster has as many nodes afterwards as before."""
        storage, start, moments = self._root / name, time.monotonic(), {}

        def happened(what: str) -> None:
            moments[what] = time.monotonic() - start

        client = self._cluster.submit(self._recipe, "--storage", storage)
        job = lines_until(client, "   job ")[-1].split()[1]
        self._kill_one_at(_TASK, lambda: True, client)
        assert not list(storage.glob("data/*/manifest.json")), "the preparation had ended before the kill"
        happened("node killed at work on the preparation")
        self._cluster.wait_for(WORKERS)  # the head and two
        happened("its loss noticed")
        client.kill()
        client.communicate()
        happened("client killed")

        watcher = self._cluster.submit("--follow", job, "--json")
        lines = lines_until(watcher, "== train connector")
        happened("preparation ended")
        self._kill_one_at(_TRAINING, lambda: bool(list(storage.glob("runs/*/checkpoints/full-*/step-*"))), watcher)
        happened("node killed at work on the training")
        self._cluster.wait_for(WORKERS - 1)
        self._cluster.add_surely(WORKERS)
        happened("another node in its place")
        lines += lines_until(watcher, "going on from the checkpoint of step")
        happened("training went on")
        out, err = watcher.communicate(timeout=_TIMEOUT)
        assert watcher.returncode == 0, "".join(lines) + err
        happened("ended")
        went_on = [line.strip() for line in (*lines, *err.splitlines()) if "going on from the checkpoint" in line]
        self._cluster.add_surely(1 + WORKERS)
        return _outcome(json.loads(out), storage, moments["ended"], went_on, moments)

    def _kill_one_at(self, title: str, ready: Callable[[], bool], client: subprocess.Popen) -> None:
        """Kill the first node that has a process of this title, once `ready` holds."""
        deadline = time.monotonic() + _TIMEOUT
        while time.monotonic() < deadline:
            assert client.poll() is None, client.stderr.read()
            if ready():
                for node in self._cluster.nodes:
                    if self._cluster.workers_of(node, title):
                        return self._cluster.kill(node)
            time.sleep(0.05)
        raise TimeoutError(f"no node had a process {title} within {_TIMEOUT} s")


def _outcome(summary: dict, storage: Path, seconds: float, went_on=(), moments=None) -> Outcome:
    model = summary["model"]
    registry = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    named = registry.get_model_version_by_alias(model["name"], model["alias"])
    weights = hashlib.sha256((Path(model["folder"]) / "model.safetensors").read_bytes()).hexdigest()
    promoted = model["promoted"] and (named.run_id, int(named.version)) == (summary["run_id"], int(model["version"]))
    return Outcome(summary["data"]["digest"], weights, promoted, seconds, [*went_on], moments or {})


def main() -> None:
    """Run the drill and print what happened when. Exit code 1 unless every round passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, default=480)
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    passed = 0
    with tempfile.TemporaryDirectory() as folder, RayCluster(WORKERS) as cluster:
        drill = Drill(cluster, Path(folder), arguments.records, arguments.steps)
        whole = drill.undisturbed()
        print(f"undisturbed: {whole.seconds:.0f} s, data {whole.digest[:19]}, weights {whole.weights[:12]}", flush=True)
        for number in range(1, arguments.rounds + 1):
            outcome = drill.disturbed(f"round-{number}")
            for what, second in outcome.moments.items():
                print(f"  {second:6.1f} s  {what}")
            same = {"data": outcome.digest == whole.digest, "weights": outcome.weights == whole.weights}
            same |= {"promoted": outcome.promoted}
            passed += all(same.values())
            verdict = ", ".join(f"{name} {'as it should be' if right else 'WRONG'}" for name, right in same.items())
            print(f"round {number}: {outcome.seconds / whole.seconds:.2f} times the time; {verdict}", flush=True)
            print(f"  {'; '.join(outcome.went_on)}", flush=True)
    print(f"{passed} of {arguments.rounds} rounds passed")
    sys.exit(passed < arguments.rounds)


if __name__ == "__main__":
    main()
