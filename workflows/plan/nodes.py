"""Hours, memory and traffic of a preparation on so many CPU nodes.

    hours    driver + workers / CPUs      driver  = DRIVER_SECONDS records
                                          workers = RECORD_SECONDS records + BYTE_SECONDS bytes of shards
    memory   CPUs of the node (WORKER_BYTES + TASK_FACTOR bytes of a shard)
    traffic  PASSES bytes of shards: pictures are read from the source, written to the work folder, read from it and
             written to the shards

The constants are of CPU time and resident memory. With pictures of 46 KiB they give 652 records per second on two CPUs,
where `python -m tests.benchmarks.prepare_throughput` measured 672. How the time falls into parts is what `python -m
tests.benchmarks.prepare_cost` fits; its runs differ: a later one had 1.6, 2.7 and 4.9 ms a record in the workers with
pictures of 26, 46 and 169 KiB, where the constants give 2.6, 2.9 and 4.4. Memory is what it measures, rounded up.
Assumed: that a record takes as long on many nodes as on one, and that the storage gives the traffic. Where it does not,
the traffic over what it gives is the time.
"""

from workflows.plan.rows import Rows

NODES = (1, 2, 4, 8, 16)
"""Numbers of nodes that a plan has a line for; the pools of cluster/ grow to the last."""
DRIVER_SECONDS = 0.1e-3
RECORD_SECONDS = 2.3e-3
BYTE_SECONDS = 12e-9
WORKER_BYTES = 256 << 20
TASK_FACTOR = 2.0
PASSES = 4


def plan_nodes(rows: Rows, shard_bytes: int, cpus: int) -> list[dict]:
    """One entry for each number of nodes, as JSON-able data.

    Args:
        rows: what is prepared; its counts are known.
        shard_bytes: of the largest shard.
        cpus: of one node.
    """
    driver = DRIVER_SECONDS * rows.samples
    workers = RECORD_SECONDS * rows.samples + BYTE_SECONDS * rows.bytes
    memory = cpus * (WORKER_BYTES + round(TASK_FACTOR * shard_bytes))
    plans = []
    for nodes in NODES:
        seconds = driver + workers / (nodes * cpus)
        traffic = PASSES * rows.bytes / seconds
        plans.append({"nodes": nodes, "hours": seconds / 3600, "node_memory": memory, "bytes_per_second": traffic})
    return plans
