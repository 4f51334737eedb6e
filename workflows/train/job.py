"""What a stage is to the driver: its identity, whether it is finished, and the job that crosses to the workers.

Light on imports, so that a run with nothing to do knows so without Ray and torch.
"""

import json
from dataclasses import dataclass
from typing import Any

from pipelines.identity import digest, identity
from workflows.recipe.schema import Recipe
from workflows.recipe.train import Part, StageRecipe, TrainRecipe
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout

MARK = "stage.json"
"""In the model folder of a finished stage: which stage it is, of which recipe and data."""


@dataclass(frozen=True)
class StageJob:
    """Everything a worker needs to run one stage."""

    stage: StageRecipe
    train: TrainRecipe
    seed: int
    data: str
    """Folder of the data set; like the other folders one that every node sees, or the URI of an object store's."""
    start_from: str
    """Folder of the model before the stage."""
    export_to: str
    """Folder of the trained model."""
    checkpoints: str
    """Folder of the stage's checkpoints."""
    threads: int
    """torch threads of one worker."""
    measured_chunks: tuple[Part, ...] = ()
    """Parts whose scan's chunk is measured."""
    mark: str = ""
    """Content of the trained model's MARK."""
    events: Any = None
    """Handle of the Desk, to which rank 0 reports; each worker puts it there."""


class StageError(RuntimeError):
    """A stage cannot run, for a reason that every worker finds alike and that trying again does not change."""


def stage_digest(recipe: Recipe, index: int, data_digests: dict[str, str]) -> str:
    """Changes when anything that decides the weights of stage `index` changes. Data digests are by stage."""
    before = recipe.train.stages[: index + 1]
    numerics = identity(recipe.train)
    stages = numerics.pop("stages")[: index + 1]
    if any(stage.best for stage in before):
        numerics |= {"validate_every": recipe.train.validate_every, "validate_rows": recipe.train.validate_rows}
    data = [data_digests[stage.name] for stage in before]
    return digest(data, recipe.seed, identity(recipe.model), numerics, stages)


def finished(folder: Folder, expected: str) -> bool:
    """Whether a stage's folder holds its finished model, of the `expected` stage digest."""
    if not folder.whole():
        return False
    try:
        return json.loads(folder.read(MARK))["digest"] == expected
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False


def checkpoint_folder(layout: Layout, stage: str, key: str) -> Folder:
    """Where a stage that is not finished has its checkpoints; `key` is its stage digest."""
    return layout.checkpoints / f"{stage}-{key}"
