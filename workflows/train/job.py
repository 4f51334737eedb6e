"""What crosses from the driver to the workers. Light on imports, so that Ray Train's controller stays so."""

from dataclasses import dataclass
from typing import Any

from workflows.recipe.train import StageRecipe, TrainRecipe

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
    mark: str = ""
    """Content of the trained model's MARK."""
    events: Any = None
    """Handle of the EventLog, on which rank 0 reports."""


class StageError(RuntimeError):
    """A stage cannot run, for a reason that every worker finds alike and that trying again does not change."""
