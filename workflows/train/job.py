"""What crosses from the driver to the workers. Light on imports, so that Ray Train's controller stays so."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StageJob:
    """Everything a worker needs to run one stage.

    `stage` and `train` are a StageRecipe and a TrainRecipe as plain data; `data`, `start_from` and `export_to` are
    folders that every node sees; `threads` is torch's.
    """

    stage: dict
    train: dict
    seed: int
    data: str
    start_from: str
    export_to: str
    threads: int

    def as_dict(self) -> dict:
        return asdict(self)


def run_job(config: dict) -> None:
    """Entry point of a Ray Train worker; torch, DeepSpeed and the model are imported here and not in the controller."""
    from workflows.train.loop import train_stage

    train_stage(StageJob(**config))
