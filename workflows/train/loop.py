"""What every training worker does: load, freeze, step, report, checkpoint, export.

The loop is exact to resume: rows and dropout are functions of (seed, step), weights, optimizer and schedule come back
from a checkpoint that all ranks wrote wholly, and rank 0 chooses for all which one that is.
"""

import gc
import json
import pickle
import uuid
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import numpy as np
import torch
import torch.distributed as dist

from mlmamba.modeling import MLMambaForConditionalGeneration
from pipelines.augment import Augmentation
from pipelines.reader import PackedDataset, prefetch, step_indices
from workflows.recipe.train import AUTO
from workflows.storage.folder import Folder
from workflows.train import autotune, restore
from workflows.train.answers import AnswerWeights, count_answers
from workflows.train.best import BestStep
from workflows.train.checkpoint import CheckpointStore
from workflows.train.dropout import add_dropout
from workflows.train.export import export_model
from workflows.train.features import keep_features
from workflows.train.job import StageError, StageJob
from workflows.train.optim import start_engine
from workflows.train.saver import Saver
from workflows.train.stage import describe, freeze, total_steps
from workflows.train.step import (
    LossWatch,
    Meter,
    MicroBatch,
    Notice,
    batch_maker,
    grad_norm,
    memory_advice,
    refuse_device,
    seed_step,
    share_of,
    take_step,
)
from workflows.train.validation import Samples, Validation


class Left(Exception):
    """Raised on all workers alike, with a checkpoint behind them, when they have been told to leave."""


def work(desk, told: Callable[[], bool]) -> None:
    """Do every job that the Desk has, on this worker; every worker of the group does the same ones.

    Args:
        told: whether this worker has been told that the group is to leave.

    Raises:
        Left: it does.
    """
    import ray.train.torch

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    group = [uuid.uuid4().hex]
    dist.broadcast_object_list(group)
    if rank == 0:
        desk.add.remote({"event": "ready", "workers": world})
    number = 0
    while True:
        number, pickled = ray.get(desk.next.remote(number))
        if pickled is None:
            return
        job = pickle.loads(pickled)
        if isinstance(job, StageJob):
            outcome = train_stage(replace(job, events=desk), rank, world, Notice(told))
        else:
            outcome = job.run(rank, world, desk.add.remote)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        ray.get(desk.finish.remote(number, group[0], rank, world, outcome))


def train_stage(job: StageJob, rank: int, world: int, notice: Notice) -> dict:
    """Run one stage on this worker; every worker of the group does.

    Args:
        notice: that the group is to leave.

    Returns:
        {"exported": True}, or {"stopped": why} when going on or trying again is of no use: the stage has diverged, or
        its storage takes no checkpoint or no model.

    Raises:
        Left: the group leaves.
    """
    torch.set_num_threads(job.threads)
    try:
        worker = Worker(job, rank, world, notice)
    except StageError as error:
        return {"stopped": str(error)}
    try:
        why = worker.train()
    finally:
        worker.flush()
    worker.close()
    return {"stopped": why} if why else {"exported": True}


class Worker:
    """One worker's part of a stage."""

    def __init__(self, job: StageJob, rank: int, world: int, notice: Notice | None = None):
        self.job, self.rank, self.world, self.notice = job, rank, world, notice or Notice()
        self.stage, self.config = job.stage, job.train
        self._sent: list = []
        refuse_device(self.config)
        torch.manual_seed(job.seed)
        self.start_from = Folder(job.start_from).fetch()
        model = MLMambaForConditionalGeneration.from_pretrained(self.start_from, dtype=torch.float32)
        sizes = freeze(model, self.stage)
        add_dropout(model, self.stage)
        if self.config.activation_checkpointing:
            model.gradient_checkpointing_enable()
        self.digest = restore.model_digest(model)
        self.dataset = PackedDataset(job.data, check=self.config.check_shards)
        sets = [self.dataset]
        if self.config.validate_every:
            sets += [PackedDataset(job.data, "validation", self.config.check_shards)]
        features = keep_features(model, sets, job.data, self.stage, self.config, (rank, world), self._note)
        self.steps = total_steps(self.stage, len(self.dataset))
        self.store = CheckpointStore(Folder(job.checkpoints))
        augment = self.stage.augment and Augmentation(**self.stage.augment.model_dump())
        weights = None
        if self.stage.balance_answers:
            weights = AnswerWeights(count_answers(self.dataset), self.stage.balance_answers)
            self._note(weights.told())

        def make(rows: int, pin: bool = False) -> Callable:
            return batch_maker(self.dataset, rows, model, pin, augment, job.seed, weights, features)

        self.chosen = autotune.choose(job, model, make, self.store, rank, self._note)
        self.stage = self.stage.model_copy(update={"micro_batch_rows": self.chosen.micro_batch_rows})
        found = restore.find(self.store, rank, world, self.config.zero_stage, self.digest, self._damaged)
        if found:
            restore.load_into_model(found, model, world)
        self.engine = start_engine(model, self.stage, self.config, self.steps)
        if found:
            restore.load_into_engine(found, self.engine, world)
            self.store.release(found)
        self.done = found.step if found else 0
        self.watch = LossWatch(self.config.max_loss_rise, found.lowest_loss if found else None)
        attempt = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(attempt)
        self.saver = Saver(self.store, attempt[0], rank, world, self.config.keep_checkpoints, self._saved)
        pin = self.engine.device.type == "cuda"
        self._make = make(self.stage.micro_batch_rows, pin)
        if self.config.validate_every:
            at_once = self.stage.micro_batch_rows
            self.validation = Validation(sets[1], self.config.validate_rows, at_once, model, pin, features)
        self.best = None
        if self.stage.best:
            self.best = BestStep(self.stage.best, self.store, rank, found.best if found else None)
        if self.config.sample_every:
            count, tokens = self.config.samples, self.config.sample_tokens
            image, layout = model.config.image_token_id, model.image_layout
            self.samples = Samples(job.data, str(self.start_from), count, tokens, image, layout)
        if self._measured:
            self.tell({"event": "chosen", "values": self.chosen.flat})
        made_by = found.workers if found and restore.must_reshard(found, world) else None
        text = describe(self.stage, sizes)
        self.tell(
            {
                "event": "start",
                "text": text,
                "step": self.done,
                "steps": self.steps,
                "resharded_from": made_by,
                "workers": world,
            }
        )
        if self.dataset.checks:
            shards = self.dataset.manifest.shards
            size = sum(shard.bytes for shard in shards) / 1e6
            text = f"its {len(shards)} shards ({size:,.1f} MB) are compared with their sha256 as they are first read"
            self._note(text)

    def train(self) -> str:
        """All steps that are left, and the export. Returns why the stage stopped, or "" when it is finished."""
        meter = Meter(self.stage.batch_rows * self.dataset.manifest.max_tokens)
        self.engine.train()
        order = step_indices(self.dataset, self.job.seed, self.stage.batch_rows, 0, 1, self.done)
        stream = prefetch(self.read, zip(count(self.done + 1), order), self.job.threads)
        try:
            for step, micro_batches in zip(range(self.done + 1, self.steps + 1), stream, strict=False):
                if self.best and self.best.waited:  # also where the checkpoint was of the last step before
                    break
                seed_step(self.job.seed, step, self.rank)
                with memory_advice(self.stage, self.config, step):
                    loss, tokens = take_step(self.engine, micro_batches, self.world, self.notice)
                meter.add(loss, tokens)
                if why := self._after_step(step, meter):
                    return why
                if step < self.steps and self.notice.heard():
                    self._leave(step)
        finally:
            stream.close()
        self.saver.settle()  # a checkpoint that could not be written matters no more
        return self._export()

    def read(self, item: tuple[int, np.ndarray]) -> list[MicroBatch]:
        """This worker's micro batches of a step, of its number and all its rows."""
        step, rows = item
        own, counts = share_of(rows, self.rank, self.world, self.stage)
        return self._make(own, counts, step)

    def _after_step(self, step: int, meter: Meter) -> str:
        """Report, validate, save as the recipe says. Returns why the stage must stop, or ""."""
        config, last = self.config, step == self.steps
        applied = self.engine.was_step_applied()  # False on all ranks alike: the gradient's norm is not finite
        save = step % config.save_every == 0 and not last
        if applied and not (save or last or step % config.log_every == 0):
            return self._validate(step, meter)
        metrics = meter.read(self.engine, step, self.steps)
        wrong = self.watch.diverged(metrics["loss"]) or ("" if applied else "the gradient norm is not finite")
        if wrong:
            return self._diverged(wrong, step, metrics["loss"])
        self.tell(metrics)
        if why := self._validate(step, meter):  # before the checkpoint, which knows what was measured
            return why
        if save:
            if problems := self.saver.settle():
                return self._cannot_save(problems)
            self._save(step)
        return ""

    def _save(self, step: int) -> None:
        about = {"zero_stage": self.config.zero_stage, "model": self.digest, "lowest_loss": self.watch.lowest}
        self.saver.save(self.engine, step, {**about, "best": self.best and self.best.saved()})

    def _leave(self, step: int) -> None:
        """Write a checkpoint of this step, unless there is one, and leave."""
        problems = self.saver.settle()
        if not problems and step % self.config.save_every:
            self._save(step)
            problems = self.saver.settle()
        kept = problems[0] if problems else f"the checkpoint of step {step} is whole"
        self.tell({"event": "note", "text": f"the workers leave: {kept}"})
        raise Left(f"after step {step}")

    def _validate(self, step: int, meter: Meter) -> str:
        """Report validation and sample answers at the steps that the recipe asks for, and keep the best step. Returns
        why the stage must stop, or ""."""
        config, last = self.config, step == self.steps
        with meter.aside():
            if config.validate_every and (last or step % config.validate_every == 0):
                found = self.validation.measure(self.engine, self.rank, self.world)
                self.tell({"event": "validation", "step": step, "loss": found.loss, "score": found.score})
                if self.best and self.best.see(step, found) and (problem := self.best.keep(self.engine)):
                    return f"stage {self.stage.name}: {problem}"
            if config.sample_every and (last or step % config.sample_every == 0):
                self.tell({"event": "samples", "step": step, "rows": self.samples.answers(self.engine)})
        return ""

    def _diverged(self, wrong: str, step: int, loss: float) -> str:
        self.saver.settle()
        safe = self.store.newest()
        kept = f"its checkpoint of step {safe.step} is kept" if safe else "it had no checkpoint yet"
        return (
            f"stage {self.stage.name} diverged at step {step} of {self.steps}: {wrong} (mean loss since the last log "
            f"{loss:.4g}, gradient norm {grad_norm(self.engine):.4g}); {kept}. Lower the stage's learning_rate (now "
            f"{self.stage.learning_rate:g}), raise its warmup (now {self.stage.warmup:g}), or look at the data of the "
            f"last {self.config.log_every} steps"
        )

    def _cannot_save(self, problems: list[str]) -> str:
        safe = self.store.newest()
        kept = f"the one of step {safe.step} is whole" if safe else "there is none before it"
        return (
            f"stage {self.stage.name}: {problems[0]}; {kept}. Make room there, or lower "
            "train.keep_checkpoints, and run again: it goes on from what is whole"
        )

    def _export(self) -> str:
        """Write the trained model. Returns why it could not be written, the same on all ranks, or ""."""
        problem, out, mark, instead = [""], Folder(self.job.export_to), self.job.mark, None
        try:
            if self.rank == 0 and self.best and self.best.step is not None:
                instead = self.best.fetch()
                mark = _with(mark, step=self.best.step)
                self.tell({"event": "best", "step": self.best.step, "text": self.best.told(self.steps)})
            if self._measured:
                mark = _with(mark, chosen=self.chosen.flat)
            if self.rank == 0:
                with out.writing() as folder:
                    export_model(self.engine, self.start_from, folder, self.rank, mark, instead)
            else:
                export_model(self.engine, self.start_from, out.local, self.rank)
        except OSError as error:
            problem = [f"stage {self.stage.name}: its model could not be written to {out}: {error}"]
        dist.broadcast_object_list(problem)
        return problem[0]

    @property
    def _measured(self) -> bool:
        """Whether the recipe left something to a measurement."""
        return self.job.stage.micro_batch_rows == AUTO or bool(self.job.measured_chunks)

    def _damaged(self, text: str) -> None:
        self.tell({"event": "damaged", "text": text})

    def _note(self, text: str) -> None:
        self.tell({"event": "note", "text": text})

    def _saved(self, step: int, seconds: float) -> None:
        self.tell({"event": "checkpoint", "step": step, "seconds": seconds})

    def tell(self, event: dict) -> None:
        """Send an event to the driver, from rank 0, without waiting: Ray Train's report would wait for its controller,
        which looks every two seconds."""
        if self.rank == 0 and self.job.events is not None:
            self._sent = [*self._sent[-20:], self.job.events.add.remote(event)]

    def flush(self) -> None:
        """Until the driver's log has every event."""
        if self._sent:
            import ray

            ray.wait(self._sent, num_returns=len(self._sent), timeout=10)

    def close(self) -> None:
        """Let go of the engine, whose hooks and buffers refer to each other, and with it of the memory."""
        self.engine.destroy()
        del self.engine


def _with(mark: str, **more) -> str:
    return json.dumps(json.loads(mark or "{}") | more, indent=2)
