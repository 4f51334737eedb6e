"""Ray Train around the loop: one group of workers for all stages of a run, restarts from the last checkpoint.

Every start of a group is a run of its own for Ray Train. Which checkpoints there are, and which of them are whole, is
read from the folders (checkpoint.py), not from Ray Train's records, which a kill may leave half written.

The workers stay for the next stage because starting them takes longer than many a stage: seconds of imports in each,
and Ray Train's own actors. Nothing but imported code is carried over. A stage reads its model and its data from their
folders, as a fresh process would, and seeds itself; its model, engine and GPU memory are given back before the next.
After a failure no process is used again: Ray Train ends the group and starts another.
"""

import json
import logging
import os
import pickle
import threading
import time
import uuid
from contextlib import suppress

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import storage
from workflows.errors import WorkflowError
from workflows.recipe.schema import Recipe
from workflows.recipe.train import StageRecipe, TrainRecipe
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout
from workflows.train.entry import Desk, JoinedByTorch, OnEvent, run_jobs
from workflows.train.job import StageJob, checkpoint_folder, stage_digest
from workflows.train.lost_nodes import BUDGETS, OnNodesThatStay, Restarts

_LOOK = 1.0  # seconds between looks whether the workers are still there
_LEAVE = 30.0  # seconds for them to leave
_GROW = 60.0  # seconds between looks whether there is room for more workers; taking more costs steps and a new start
_WATCHES = os.environ.get(ENABLE_PREEMPTION_WATCHER_ENV_VAR)  # read once: each trainer decides anew
logger = logging.getLogger(__name__)


def run_stage(
    recipe: Recipe,
    stage: StageRecipe,
    layout: Layout,
    data_digests: dict[str, str],
    on_event: OnEvent,
    crew: "Crew | None" = None,
) -> Folder:
    """Train one stage from the model before it, or go on from its last checkpoint. Returns the trained model's folder.

    Args:
        crew: the workers, which stay for the next stage; None: some for this stage alone.

    Raises:
        WorkflowError: training failed more often than the recipe allows, diverged, or its storage takes no checkpoint.
    """
    if crew is None:
        with Crew(recipe.train, layout) as own:
            return run_stage(recipe, stage, layout, data_digests, on_event, own)
    index = [s.name for s in recipe.train.stages].index(stage.name)
    out = layout.stage(stage.name)
    checkpoints = checkpoint_folder(layout, stage.name, stage_digest(recipe, index, data_digests))
    job = stage_job(recipe, stage, layout, data_digests, checkpoints)
    outcome = crew.run(job, f"stage {stage.name}", on_event)
    if "stopped" in outcome:
        raise WorkflowError(outcome["stopped"])
    with suppress(OSError):
        checkpoints.delete()  # only an unfinished stage needs them
    return out


def stage_job(
    recipe: Recipe, stage: StageRecipe, layout: Layout, data_digests: dict[str, str], checkpoints: Folder
) -> StageJob:
    """The job of a stage, which starts from the model before it."""
    index = [s.name for s in recipe.train.stages].index(stage.name)
    start_from = layout.stage(recipe.train.stages[index - 1].name) if index else layout.initial
    key = stage_digest(recipe, index, data_digests)
    return StageJob(
        stage=stage,
        train=recipe.train,
        seed=recipe.seed,
        data=layout.data[stage.name].uri,
        start_from=start_from.uri,
        export_to=layout.stage(stage.name).uri,
        checkpoints=checkpoints.uri,
        mark=json.dumps({"digest": key, "stage": stage.name, "data": data_digests[stage.name]}, indent=2),
        threads=recipe.train.cpus_per_worker,
        measured_chunks=recipe.model.measured_chunks,
    )


class CrewLost(RuntimeError):
    """Workers died at a job that need not be theirs."""


class Crew:
    """The training workers of a run, started with their first job. A context manager: they leave at its end.

    Args:
        train: how many workers, and what each has.
        layout: of the run, for what Ray Train writes.
    """

    def __init__(self, train: TrainRecipe, layout: Layout):
        self._train, self._storage = train, layout.checkpoints / ".ray"
        self._desk = None
        self._group: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._desk is None:
            return
        self.dismiss()
        # When the run is interrupted, workers in the midst of a step do not hear it; they end with this process.
        if self._group is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
            self._group.join(_LEAVE)
        ray.kill(self._desk)
        self._desk = None
        with suppress(OSError):
            self._storage.delete()

    def dismiss(self) -> None:
        """Send the workers home, without waiting until they have left."""
        if self._desk is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(self._desk.give.remote(None), timeout=_LEAVE)

    def suits(self, workers: int, cpus: int, gpus: float) -> bool:
        """Whether so many workers are there with so much each, and write where the driver reads."""
        have = self._train
        enough = workers <= have.least_workers and cpus <= have.cpus_per_worker and gpus <= have.gpus_per_worker
        return self.started and enough and bool(gpus) == bool(have.gpus_per_worker) and not self._storage.remote

    @property
    def started(self) -> bool:
        """Whether there are workers that wait for a job."""
        return self._group is not None and self._group.is_alive()

    def run(self, job, name: str, on_event: OnEvent, again: bool = True) -> dict:
        """Give all workers a job and wait for its end. Returns rank 0's outcome.

        When a worker dies or a node is lost the group starts again with the same job, as often as the recipe allows
        for each job.

        Args:
            job: a StageJob, or an object whose method `run(rank, world, tell)` gives the outcome.
            name: what it is called in errors.
            on_event: called with every event. One on which it fails is dropped with a warning, so that training does
                not end because a line of its log could not be written.
            again: when a worker dies, wait for another group, which may want a node that is lost.

        Raises:
            WorkflowError: workers failed more often than allowed.
            CrewLost: one died, and not `again`; the others are sent home.
        """
        failed, began = None, time.monotonic()

        def handle(events: list[dict]) -> None:
            nonlocal failed
            for event in events:
                failed = event if event["event"] == "failure" else failed
                if event["event"] == "ready":
                    seconds = time.monotonic() - began
                    text = f"{event['workers']} workers are there after {seconds:.0f} s, loading model and data ..."
                    event = {"event": "note", "text": text}
                try:
                    on_event(event)
                except Exception as error:
                    logger.warning("a training event is lost (%s): %s", event.get("event"), error)

        if self._desk is None:
            here = ray.get_runtime_context().get_node_id()  # lives as long as we do
            self._desk = Desk.options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)).remote()
        ray.get(self._desk.give.remote(pickle.dumps(job)))
        while True:
            if not self.started:
                least, most = self._train.least_workers, self._train.most_workers
                number = f"{most}" if least == most else f"{least} to {most}"
                handle([{"event": "note", "text": f"starting {number} workers ..."}])
                self._start(name)
            events, outcome = ray.get(self._desk.take.remote(_LOOK))
            handle(events)
            if outcome is not None:
                return outcome
            if failed and not again:
                self.dismiss()
                raise CrewLost(name)
            if not self.started:
                handle(ray.get(self._desk.take.remote(_LOOK))[0])
                cause = self._error or RuntimeError("the workers left before it was finished")
                text = f"{name} failed: {_root_cause(cause)}"
                if failed and failed["spent"]:
                    text += f" ({BUDGETS[failed['kind']]} allows no more restarts)"
                raise WorkflowError(text) from cause

    def _start(self, name: str) -> None:
        self._error = None
        trainer = self._trainer(f"{name.split()[-1]}-{uuid.uuid4().hex[:8]}")
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        self._group = threading.Thread(target=self._fit, args=(trainer,), name="workers", daemon=True)
        self._group.start()

    def _fit(self, trainer: "_Trainer") -> None:
        """Runs beside the driver's own work for as long as there are workers."""
        try:
            trainer.fit()
        except BaseException as error:
            self._error = error

    def _trainer(self, name: str) -> "_Trainer":
        train = self._train
        filesystem, path = storage.open_fs(self._storage.uri)
        filesystem.create_dir(path)
        if train.least_workers < train.most_workers:  # a group that waits for a node that is lost, or else for 60 s
            os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, "20")
        return _Trainer(
            Restarts(self._desk, train.max_failures, train.max_lost_nodes),
            run_jobs,
            train_loop_config={"desk": self._desk},
            backend_config=JoinedByTorch("nccl" if train.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=train.workers,  # two numbers: Ray Train takes as many as it finds room for
                elastic_resize_monitor_interval_s=_GROW,
                use_gpu=bool(train.gpus_per_worker),
                resources_per_worker={"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker},
            ),
            run_config=RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                worker_runtime_env={"env_vars": _worker_environment(train)},
            ),
        )


class _Trainer(DataParallelTrainer):
    """Ray Train's trainer with policies of our own, which it has no argument for, and without the actors that are of no
    use here: each is a process that imports Ray Train for seconds."""

    def __init__(self, restarts: Restarts, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._restarts = restarts

    def _create_default_callbacks(self):
        unused = [DatasetsCallback]  # shares out Ray Data sets; workers read shards
        if self._alone():
            unused.append(PlacementGroupCleanerCallback)  # for a controller that dies while the cluster lives on
        return [one for one in super()._create_default_callbacks() if type(one) not in unused]

    def _alone(self) -> bool:
        """Whether all is on this machine and stays there, so that no other node can be lost or taken back."""
        return len(ray.nodes()) == 1 and not self.scaling_config.elasticity_enabled

    def _initialize_and_run_controller(self, **parts):
        parts["failure_policy"] = self._restarts
        if _WATCHES is None:
            os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = str(int(not self._alone()))
        if self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = OnNodesThatStay(self.scaling_config)
        return super()._initialize_and_run_controller(**parts)


def _worker_environment(train: TrainRecipe) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(train.cpus_per_worker), "TOKENIZERS_PARALLELISM": "false"}
    if not train.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    return {key: os.environ.get(key, value) for key, value in environment.items()}


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__
