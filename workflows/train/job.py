"""What crosses from the driver to the workers. Light on imports, so that Ray Train's controller stays so."""

from dataclasses import dataclass
from typing import Any

MARK = "stage.json"
"""In the model folder of a finished stage: which stage it is, of which recipe and data."""


@dataclass(frozen=True)
class StageJob:
    """Everything a worker needs to run one stage.

    `stage` and `train` are a StageRecipe and a TrainRecipe as plain data; `data`, `start_from`, `export_to` and
    `checkpoints` are folders that every node sees, or URIs of an object store; `mark` is the text of the export's
    MARK; `threads` is torch's; `events` is the handle of the EventLog.
    """

    stage: dict
    train: dict
    seed: int
    data: str
    start_from: str
    export_to: str
    checkpoints: str
    threads: int
    mark: str = ""
    events: Any = None

    def as_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class StageError(RuntimeError):
    """A stage cannot run, for a reason that every worker finds alike and that trying again does not change."""
