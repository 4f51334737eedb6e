"""What can be known to go wrong before any work starts."""

import ray

from pipelines.manifest import Manifest
from workflows.config import Recipe
from workflows.configs.train import TrainRecipe
from workflows.errors import WorkflowError


def check_cluster(recipe: Recipe) -> None:
    """Raise WorkflowError when the cluster that Ray is connected to can never hold the workers."""
    check_fit(recipe.train, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def check_fit(train: TrainRecipe, nodes: list[dict[str, float]]) -> None:
    """Raise WorkflowError when nodes with these resources can never hold the workers."""
    each = {"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker}
    for kind, amount in each.items():
        there = sum(node.get(kind, 0) for node in nodes)
        if train.workers * amount > there:
            raise WorkflowError(
                f"training wants {train.workers} workers x {amount} {kind}, the cluster has {there:g} {kind}: "
                "lower train.workers, or add nodes"
            )
    fit = sum(min(int(node.get(kind, 0) // amount) for kind, amount in each.items() if amount) for node in nodes)
    if fit < train.workers:
        wants = " and ".join(f"{amount} {kind}" for kind, amount in each.items() if amount)
        raise WorkflowError(
            f"training wants {train.workers} workers with {wants} each, the cluster's {len(nodes)} nodes hold {fit} of "
            "them (a worker does not span nodes): lower train.cpus_per_worker or train.workers, or add nodes"
        )


def check_stages(recipe: Recipe, manifests: dict[str, Manifest]) -> None:
    """Raise WorkflowError when a stage cannot be trained on its data; `manifests` are by stage."""
    train = recipe.train
    for stage in train.stages:
        splits = manifests[stage.name].splits
        rows = splits["train"].rows
        if rows < stage.batch_rows:
            raise WorkflowError(
                f"stage {stage.name}: one step takes {stage.batch_rows} packed rows, its data set has {rows}: lower "
                "batch_rows, or prepare more data"
            )
        for field in ("validate_every", "sample_every"):
            if getattr(train, field) and "validation" not in splits:
                raise WorkflowError(
                    f"train.{field} is set, but the data of stage {stage.name} has no validation split: give "
                    f"data.validation sources, or take train.{field} out"
                )
