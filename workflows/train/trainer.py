"""Ray Train around the loop: one TorchTrainer per stage, events to the driver, restarts from the last checkpoint.

Every start is a run of its own for Ray Train. Which checkpoints there are, and which of them are whole, is read from
the folders (checkpoint.py), not from Ray Train's records, which a kill may leave half written.
"""

import json
import logging
import os
import uuid
from contextlib import suppress

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import storage
from pipelines.identity import digest, identity
from workflows.errors import WorkflowError
from workflows.recipe.schema import Recipe
from workflows.recipe.train import StageRecipe
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout
from workflows.train.entry import EventLog, Failures, OnEvent, Pump, run_job
from workflows.train.job import MARK, StageJob


def stage_digest(recipe: Recipe, index: int, data_digests: dict[str, str]) -> str:
    """Changes when anything that decides the weights of stage `index` changes. Data digests are by stage."""
    before = recipe.train.stages[: index + 1]
    numerics = identity(recipe.train)
    stages = numerics.pop("stages")[: index + 1]
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


def run_stage(
    recipe: Recipe, stage: StageRecipe, layout: Layout, data_digests: dict[str, str], on_event: OnEvent
) -> Folder:
    """Train one stage from the model before it, or go on from its last checkpoint. Returns the trained model's folder.

    Raises:
        WorkflowError: training failed more often than the recipe allows, diverged, or its storage takes no checkpoint.
    """
    index = [s.name for s in recipe.train.stages].index(stage.name)
    start_from = layout.stage(recipe.train.stages[index - 1].name) if index else layout.initial
    out, key = layout.stage(stage.name), stage_digest(recipe, index, data_digests)
    checkpoints, ray_storage = checkpoint_folder(layout, stage.name, key), layout.checkpoints / ".ray"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # lives as long as we do
    log = EventLog.options(scheduling_strategy=here).remote()
    pump = Pump(log, on_event)
    job = StageJob(
        stage=stage,
        train=recipe.train,
        seed=recipe.seed,
        data=layout.data[stage.name].uri,
        start_from=start_from.uri,
        export_to=out.uri,
        checkpoints=checkpoints.uri,
        mark=json.dumps({"digest": key, "stage": stage.name, "data": data_digests[stage.name]}, indent=2),
        threads=recipe.train.cpus_per_worker,
        events=log,
    )
    trainer = _trainer(recipe, job, f"{stage.name}-{key}-{uuid.uuid4().hex[:8]}", ray_storage.uri)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    pump.start()
    try:
        outcome = trainer.fit().return_value or {}
    except ray.train.TrainingFailedError as error:
        raise WorkflowError(f"stage {stage.name} failed: {_root_cause(error)}") from error
    finally:
        pump.stop()
        ray.kill(log)
        with suppress(OSError):
            ray_storage.delete()
    if "stopped" in outcome:
        raise WorkflowError(outcome["stopped"])
    with suppress(OSError):
        checkpoints.delete()  # only an unfinished stage needs them
    return out


def _trainer(recipe: Recipe, job: StageJob, name: str, ray_storage: str) -> TorchTrainer:
    train = recipe.train
    filesystem, path = storage.open_fs(ray_storage)
    filesystem.create_dir(path)
    return TorchTrainer(
        run_job,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=bool(train.gpus_per_worker),
            resources_per_worker={"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=train.max_failures),
            callbacks=[Failures(job.events)],
            worker_runtime_env={"env_vars": _worker_environment(recipe)},
        ),
    )


def _worker_environment(recipe: Recipe) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(recipe.train.cpus_per_worker), "TOKENIZERS_PARALLELISM": "false"}
    if not recipe.train.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    return {key: os.environ.get(key, value) for key, value in environment.items()}


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__
