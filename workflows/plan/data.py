"""The plan of a preparation: samples, rows, shards, bytes, and the memory of its largest tasks."""

import math
from pathlib import Path

from pipelines.config import DataConfig
from workflows.build import image_tokens
from workflows.config import DataRecipe, Recipe
from workflows.layout import data_folder, layout_of
from workflows.plan.rows import check_labels, count_rows


def plan_data(recipe: Recipe | DataRecipe, storage: Path, given: dict[str, tuple[int, int | None]]) -> dict:
    """One entry per data set, as JSON-able data.

    Args:
        given: counts by source, see `count_rows`.
    """
    if isinstance(recipe, DataRecipe):
        tokens = recipe.tokens_per_image
        sets = {data_folder(storage, recipe.data, recipe.name, tokens, recipe.seed): recipe.data}
    else:
        tokens = image_tokens(recipe.model)
        layout = layout_of(recipe, storage, tokens)
        sets = {layout.data[stage.name]: recipe.data_of(stage) for stage in recipe.train.stages}
    check_labels(given, list(sets.values()))
    return {"data": [_plan_one(folder, data, tokens, given) for folder, data in sets.items()]}


def _plan_one(folder: Path, data: DataConfig, tokens: int, given: dict[str, tuple[int, int | None]]) -> dict:
    rows = count_rows(data, folder, tokens, given)
    plan = {"folder": str(folder), "rows": rows.as_dict(), "max_tokens": data.max_tokens, "shards": None}
    if rows.rows is not None:
        shards = math.ceil(rows.rows / data.shard_rows)
        # A packing task holds the rows of one shard, pictures included (DataConfig.shard_rows).
        plan |= {"shards": shards, "task_bytes": rows.bytes // rows.rows * min(data.shard_rows, rows.rows)}
    return plan
