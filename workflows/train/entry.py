"""Entry point of a Ray Train worker. Light on imports: Ray Train's controller loads this file too."""

from workflows.train.job import StageJob


def run_job(config: dict) -> dict:
    """Run one stage on this worker; torch, DeepSpeed and the model are imported here and not in the controller."""
    from workflows.train.loop import train_stage

    return train_stage(StageJob(**config))
