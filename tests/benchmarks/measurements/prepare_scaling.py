"""How much faster `prepare` is on two nodes with a core each than on one: a real Ray cluster on this machine.

    python -m tests.benchmarks.measurements.prepare_scaling --records 15000

Every node is a raylet of its own with one worker process. All of it, the driver and Ray itself included, is held to as
many of the machine's cores as there are nodes: a single node would otherwise have a core for its work and the rest of
the machine for everything else. The workers are started before the clock is.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from pipelines.config import DataConfig, TokenizerConfig
from pipelines.execution import quiet_ray_data, run_tasks
from pipelines.prepare import prepare
from pipelines.tokenizer import load_or_train, save
from tests.benchmarks.measurements.prepare_corpus import WORDS, data_config, write_corpus

_STORE = 200 << 20  # bytes of a node's object store
TARGET = 1.7


def main() -> None:
    """Run on one node and on two, in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=15_000)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("this needs two cores")
    seconds: dict[int, list[float]] = {1: [], 2: []}
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        root = write_corpus(Path(folder), arguments.records, arguments.images)
        tokenizer = str(root / "tokenizer")
        save(load_or_train(TokenizerConfig(train_vocab_size=2000), [" ".join(WORDS)] * 50), tokenizer)
        config = DataConfig(**data_config(root, tokenizer={"name": tokenizer}, partition_records=250))
        for run in range(arguments.repeat):
            for nodes in seconds:
                taken, digest = _run(nodes, config, str(root / f"out-{nodes}-{run}"))
                seconds[nodes].append(taken)
                digests.add(digest)
    assert len(digests) == 1, digests
    one, two = (statistics.median(values) for values in seconds.values())
    print(f"{arguments.records:,} records, median of {arguments.repeat}, one digest for all runs")
    for nodes, values in seconds.items():
        rate = arguments.records / statistics.median(values)
        every = " ".join(f"{value:.1f}" for value in values)
        print(f"{nodes} x 1 core {statistics.median(values):7.1f} s {rate:7,.0f} records/s   (every run: {every})")
    print(f"speed-up {one / two:.2f}, target {TARGET}")


def _run(nodes: int, config: DataConfig, out: str) -> tuple[float, str]:
    """Seconds and digest of one preparation on a fresh cluster whose workers are up."""
    cores = os.sched_getaffinity(0)
    _hold_to(set(sorted(cores)[:nodes]))
    head = {"num_cpus": 1, "object_store_memory": _STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1, object_store_memory=_STORE)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        with quiet_ray_data():
            used = {result["node"] for result in run_tasks(_warm, [{}] * 8 * nodes)}
        assert len(used) == nodes, f"{len(used)} of {nodes} nodes took tasks"
        start = time.perf_counter()
        manifest = prepare(config, out, 729, 0)
        return time.perf_counter() - start, manifest.digest
    finally:
        ray.shutdown()
        cluster.shutdown()
        _hold_to(cores)


def _hold_to(cores: set[int]) -> None:
    """Let every thread of this process, and what it starts from now on, run on these cores only."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def _warm(task: dict) -> dict:
    import pipelines.pack  # noqa: F401  (loads into the worker what tasks need)

    time.sleep(0.3)  # long enough that the tasks spread over the nodes
    return {"node": ray.get_runtime_context().get_node_id()}


if __name__ == "__main__":
    main()
