"""Ray Train around the loop: one TorchTrainer per stage, events to the driver, restarts from the last checkpoint."""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from workflows.config import Recipe, digest
from workflows.configs.train import StageRecipe
from workflows.errors import WorkflowError
from workflows.layout import Layout, write_atomic
from workflows.train.job import StageJob, run_job

OnEvent = Callable[[dict], None]
DONE = "stage.json"


@ray.remote(num_cpus=0)
class EventLog:
    """Holds the workers' reports until the driver takes them."""

    def __init__(self):
        self._events: list[dict] = []

    def add(self, event: dict) -> None:
        self._events.append(event)

    def take(self) -> list[dict]:
        events, self._events = self._events, []
        return events


class _Forward(UserCallback):
    """Runs in Ray Train's controller: rank 0's report goes to the EventLog."""

    def __init__(self, log):
        self._log = log

    def after_report(self, run_context, metrics, checkpoint) -> None:
        event = dict(metrics[0])
        if checkpoint is not None:
            event["checkpoint"] = Path(checkpoint.path).name
        if event:
            self._log.add.remote(event)

    def after_exception(self, run_context, worker_exceptions) -> None:
        rank, error = next(iter(worker_exceptions.items()))
        text = f"worker {rank} failed: {type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
        self._log.add.remote({"event": "failure", "text": text})


class _Pump(threading.Thread):
    """Takes events from the log and hands them to the driver's callback until stopped."""

    def __init__(self, log, on_event: OnEvent):
        super().__init__(name="train-events", daemon=True)
        self._log, self._on_event, self._stopped = log, on_event, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.5):
            self._drain()

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        self._drain()

    def _drain(self) -> None:
        for event in ray.get(self._log.take.remote()):
            self._on_event(event)


def stage_digest(recipe: Recipe, index: int, data_digests: dict[str, str]) -> str:
    """Changes when anything that decides the weights of stage `index` changes. Data digests are by stage."""
    before = recipe.train.stages[: index + 1]
    numerics = recipe.train.model_dump(include={"workers", "zero_stage", "precision"})
    stages = [stage.model_dump(mode="json") for stage in before]
    data = [data_digests[stage.name] for stage in before]
    return digest(data, recipe.seed, recipe.model.model_dump(mode="json"), numerics, stages)


def finished(folder: Path, expected: str) -> bool:
    """Whether a stage's folder holds its finished model."""
    try:
        return json.loads((folder / DONE).read_text())["digest"] == expected
    except (OSError, ValueError, KeyError):
        return False


def check_cluster(recipe: Recipe) -> None:
    """Raise WorkflowError when the cluster can never hold the workers, before anything starts."""
    train = recipe.train
    have = ray.cluster_resources()
    for kind, each in (("CPU", train.cpus_per_worker), ("GPU", train.gpus_per_worker)):
        there = have.get(kind, 0)
        if train.workers * each > there:
            raise WorkflowError(
                f"training wants {train.workers} workers x {each} {kind}, the cluster has {there:g} {kind}: "
                "lower train.workers, or add nodes"
            )


def run_stage(
    recipe: Recipe, stage: StageRecipe, layout: Layout, data_digests: dict[str, str], on_event: OnEvent
) -> Path:
    """Train one stage from the model before it. Returns the folder of the trained model.

    Raises:
        WorkflowError: training failed more often than the recipe allows.
    """
    index = [s.name for s in recipe.train.stages].index(stage.name)
    start_from = layout.stage(recipe.train.stages[index - 1].name) if index else layout.initial
    out, key = layout.stage(stage.name), stage_digest(recipe, index, data_digests)
    job = StageJob(
        stage=stage.model_dump(mode="json"),
        train=recipe.train.model_dump(mode="json"),
        seed=recipe.seed,
        data=str(layout.data[stage.name]),
        start_from=str(start_from),
        export_to=str(out),
        threads=recipe.train.cpus_per_worker,
    )
    log = EventLog.remote()
    pump = _Pump(log, on_event)
    trainer = TorchTrainer(
        run_job,
        train_loop_config=job.as_dict(),
        scaling_config=ScalingConfig(
            num_workers=recipe.train.workers,
            use_gpu=bool(recipe.train.gpus_per_worker),
            resources_per_worker={"CPU": recipe.train.cpus_per_worker, "GPU": recipe.train.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=f"{stage.name}-{key}",
            storage_path=str(layout.checkpoints),
            failure_config=FailureConfig(max_failures=recipe.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[_Forward(log)],
            worker_runtime_env={"env_vars": _worker_environment(recipe)},
        ),
    )
    layout.checkpoints.mkdir(parents=True, exist_ok=True)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    pump.start()
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise WorkflowError(f"stage {stage.name} failed: {_root_cause(error)}") from error
    finally:
        pump.stop()
        ray.kill(log)
    text = json.dumps({"digest": key, "stage": stage.name, "data": data_digests[stage.name]}, indent=2)
    write_atomic(out / DONE, text)
    shutil.rmtree(layout.checkpoints / f"{stage.name}-{key}", ignore_errors=True)  # only an unfinished stage needs them
    return out


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
