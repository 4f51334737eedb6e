"""Preparation while processes are killed: every run must end, after at most one rerun, in the undisturbed run's digest.

    python -m tests.benchmarks.drills.prepare_faults --kills 21

A Ray cluster of two nodes with a CPU each runs on this machine. Each trial starts a preparation in a process of its
own and, shortly after a random one of its progress events, kills with SIGKILL in turn: a worker process; a whole node
that is not the head (its raylet and all its workers); the driver. A killed driver is started again once; so is one that
gave up. No trial may leave a manifest that does not fit its shards.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from pipelines.config import DataConfig
from pipelines.verify import verify
from tests.benchmarks.measurements.prepare_corpus import data_config, write_corpus

KINDS = ("worker", "node", "driver")
_SYSTEM = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
_STORE = 200 << 20  # bytes of a node's object store
_TIMEOUT = 300  # seconds after which a run counts as one that does not end
_DRIVER = """
import logging, sys
import ray
from pipelines.config import DataConfig
from pipelines.prepare import prepare

ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
config = DataConfig.model_validate_json(sys.argv[2])


def show(event):
    if event.total or not event.done:  # listing the records takes no time and would have most of the events
        print(event.phase, event.done, flush=True)


print(prepare(config, sys.argv[3], 9, 7, show).digest, flush=True)
"""


@dataclass(frozen=True)
class Trial:
    """What became of one kill."""

    kind: str
    moment: str
    """The progress event that it came after."""
    victim: str
    """What was killed, or "" when the run had ended before."""
    reruns: int
    reason: str
    """Why it took a rerun: the last line of what the first run said."""
    wrong: str
    """"" when the digest is that of the undisturbed run and the data set verifies, else what there was instead."""
    seconds: float


def main() -> None:
    """Try every kind of kill in turn and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=21)
    parser.add_argument("--records", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, FaultyCluster() as cluster:
        runner = Faults(cluster, Path(folder), arguments.records, arguments.seed)
        print(f"undisturbed: {runner.seconds:.1f} s, {runner.events} events, digest {runner.digest[:12]}", flush=True)
        trials = []
        while len([trial for trial in trials if trial.victim]) < arguments.kills:
            trials.append(runner.trial(KINDS[len(trials) % len(KINDS)]))
            t = trials[-1]
            print(
                f"{t.kind:7} after {t.moment:18} {t.victim or 'had ended before':34} reruns {t.reruns}  "
                f"{t.seconds:5.1f} s  {t.wrong or 'same digest'}  {t.reason[:150]}",
                flush=True,
            )
    for kind in KINDS:
        own = [trial for trial in trials if trial.kind == kind and trial.victim]
        right, reruns = sum(not trial.wrong for trial in own), sum(trial.reruns for trial in own)
        print(f"{kind:7} {len(own)} killed, {right} ended in the same digest, {reruns} of them after a rerun")
    if any(trial.wrong for trial in trials):
        sys.exit(1)


class FaultyCluster:
    """Two Ray nodes with a CPU each as processes of this machine; the second one may be killed and comes back."""

    def __enter__(self) -> "FaultyCluster":
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "object_store_memory": _STORE,
                "include_dashboard": False,
                "_system_config": _SYSTEM,
            },
        )
        self.address = self._cluster.address
        self._add()
        return self

    def __exit__(self, *error) -> None:
        self._cluster.shutdown()

    def workers(self) -> list[psutil.Process]:
        """Worker processes of both nodes: those on our tasks when there are any, else all."""
        raylets = [self._raylet(node) for node in self._cluster.list_all_nodes()]
        found = [(child, _title(child)) for raylet in raylets for child in raylet.children(recursive=True)]
        # Not the raylet's agents: a raylet ends with them, which would be the loss of a node, or even of the head.
        workers = [(child, title) for child, title in found if title.startswith("ray::") and "Agent" not in title]
        return [child for child, title in workers if "Map" in title] or [child for child, _ in workers]

    def kill_node(self) -> str:
        """Kill all processes of the second node at once, and start another one in its place."""
        raylet = self._raylet(self._node)
        victims = [raylet, *raylet.children(recursive=True)]
        for victim in victims:
            _kill(victim)
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._add()
        return f"raylet and {len(victims) - 1} children"

    def _add(self) -> None:
        self._node = self._cluster.add_node(num_cpus=1, object_store_memory=_STORE)

    @staticmethod
    def _raylet(node) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)


class Faults:
    """Runs the same preparation again and again on a cluster, with and without a kill."""

    def __init__(self, cluster: FaultyCluster, root: Path, records: int, seed: int = 0):
        self._cluster, self._root, self._random = cluster, root, random.Random(seed)
        write_corpus(root / "corpus", records, min(records, 400), (160, 320))
        settings = data_config(root / "corpus", max_tokens=512, partition_records=max(records // 24, 1), shard_rows=32)
        self._config = DataConfig(**settings).model_dump_json()
        self._run("warm").communicate(timeout=_TIMEOUT)  # starts the workers, which the timed run shall not pay for
        start = time.monotonic()
        *events, self.digest = self._run("undisturbed").communicate(timeout=_TIMEOUT)[0].decode().splitlines()
        self.seconds, self.events = time.monotonic() - start, len(events)

    def trial(self, kind: str) -> Trial:
        """One run with one kill."""
        start, out, moment = time.monotonic(), self._root / "trial", ""
        process = self._run("trial")
        for _ in range(self._random.randrange(1, self.events)):
            moment = process.stdout.readline().decode().strip() or moment
        time.sleep(self._random.random() * self.seconds / self.events)
        victim = "" if process.poll() is not None else self._kill(kind, process)
        reruns, reason, ended = 0, "", self._end(process)
        if (out / "manifest.json").exists() and verify(str(out)):
            ended = "a manifest that does not fit"
        elif ended != self.digest:
            said = (self._root / "stderr").read_text().split("\n")
            reruns, reason, ended = 1, [ended, *filter(None, said)][-1], self._end(self._run("trial"))
        wrong = "" if ended == self.digest else f"not the same: {ended}"
        wrong = wrong or "; ".join(verify(str(out)))
        shutil.rmtree(out, ignore_errors=True)
        return Trial(kind, moment, victim, reruns, reason, wrong, time.monotonic() - start)

    def _kill(self, kind: str, driver: subprocess.Popen) -> str:
        if kind == "driver":
            driver.kill()
            return f"process {driver.pid}"
        if kind == "node":
            return self._cluster.kill_node()
        victim = self._random.choice(self._cluster.workers())
        title = _title(victim)
        return f"{title[:26]} {victim.pid}" if _kill(victim) else ""

    def _run(self, name: str) -> subprocess.Popen:
        """Start a driver. It writes a line per progress event and the digest last."""
        command = [sys.executable, "-c", _DRIVER, self._cluster.address, self._config, str(self._root / name)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        with open(self._root / "stderr", "w") as errors:
            process = subprocess.Popen(
                command, 0, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True
            )
        return process

    @staticmethod
    def _end(process: subprocess.Popen) -> str:
        """The last word of a driver: its digest when all went well."""
        try:
            words = process.communicate(timeout=_TIMEOUT)[0].decode().split()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "did not end"
        return words[-1] if process.returncode == 0 and words else f"exit code {process.returncode}"


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _kill(process: psutil.Process) -> bool:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


if __name__ == "__main__":
    main()
