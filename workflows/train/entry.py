"""Entry point of a Ray Train worker. Light on imports: Ray Train's controller loads this file too."""


def run_job(config: dict) -> dict:
    """Run the StageJob in `config["job"]`; torch, DeepSpeed and the model are imported here, not in the controller."""
    from workflows.train.loop import train_stage

    return train_stage(config["job"])
