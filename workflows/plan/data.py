"""The plan of a preparation: samples, rows, shards, bytes, and hours and memory by the number of nodes."""

import math

from pipelines.config import DataConfig
from workflows.errors import UsageError
from workflows.plan.rows import Rows, check_labels, count_rows
from workflows.recipe.schema import DataRecipe, Recipe
from workflows.storage.folder import Folder
from workflows.storage.layout import data_folder, layout_of
from workflows.train.initial import image_tokens


def plan_data(
    recipe: Recipe | DataRecipe, storage: Folder, given: dict[str, tuple[int, int | None]], node_cpus: int
) -> dict:
    """One entry per data set, as JSON-able data.

    Args:
        given: counts by source, see `count_rows`.
        node_cpus: CPUs of one node.

    Raises:
        UsageError: a number makes no sense.
    """
    if node_cpus < 1:
        raise UsageError(f"--node-cpus {node_cpus} must be 1 or more")
    if isinstance(recipe, DataRecipe):
        tokens = recipe.tokens_per_image
        sets = {data_folder(storage, recipe.data, recipe.name, tokens, recipe.seed): recipe.data}
    else:
        tokens = image_tokens(recipe.model)
        layout = layout_of(recipe, storage, tokens)
        sets = {layout.data[stage.name]: recipe.data_of(stage) for stage in recipe.train.stages}
    check_labels(given, list(sets.values()))
    return {"data": [_plan_one(folder, data, tokens, given, node_cpus) for folder, data in sets.items()]}


def _plan_one(
    folder: Folder, data: DataConfig, tokens: int, given: dict[str, tuple[int, int | None]], node_cpus: int
) -> dict:
    rows = count_rows(data, folder.local, tokens, given)
    plan = {"folder": folder.shown, "rows": rows.as_dict(), "max_tokens": data.max_tokens, "shards": None}
    if rows.rows is not None:
        # A packing task holds the rows of one shard, images included (DataConfig.shard_rows).
        task = rows.bytes // rows.rows * min(data.shard_rows, rows.rows)
        plan |= {"shards": math.ceil(rows.rows / data.shard_rows), "task_bytes": task}
        # The tokenized records lie in the work folder, with their images, until the shards are whole.
        plan |= {"disk": {"shards": rows.bytes, "work": rows.bytes, "total": 2 * rows.bytes}}
        plan |= {"node_cpus": node_cpus, "nodes": plan_nodes(rows, task, node_cpus)}
    return plan


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
