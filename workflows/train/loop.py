"""What every training worker does: load, freeze, step, report, checkpoint, export.

The loop is exact to resume: the data order is a function of (seed, step), the optimizer and schedule come back from the
DeepSpeed checkpoint, and a checkpoint is reported only when all ranks have written their part.
"""

import gc
import os
import resource
import tempfile
import time
from pathlib import Path

import deepspeed
import deepspeed.ops
import ray.train
import torch
import torch.distributed as dist

from mlmamba.conversation import IGNORE_INDEX
from mlmamba.modeling import MLMambaForConditionalGeneration
from pipelines.reader import PackedDataset, collate, prefetch, step_indices
from workflows.configs.train import StageRecipe, TrainRecipe
from workflows.train.export import export_model
from workflows.train.job import StageJob
from workflows.train.stage import describe, freeze, parameter_groups, schedule, total_steps

# DeepSpeed would compile this extension on first use on a CPU: a minute, a compiler, and it serves only inference.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train_stage(job: StageJob) -> None:
    """Run one stage on this worker; every worker of the group does."""
    stage, train = StageRecipe(**job.stage), TrainRecipe(**job.train)
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()

    model = MLMambaForConditionalGeneration.from_pretrained(job.start_from, dtype=torch.float32)
    sizes = freeze(model, stage)
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable()
    dataset = PackedDataset(job.data)
    steps = total_steps(stage, len(dataset))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, stage.weight_decay), lr=stage.learning_rate, betas=(0.9, 0.98), eps=1e-8
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule(stage, optimizer, steps),
        config=deepspeed_config(stage, train),
    )
    done = _restore(engine)
    if rank == 0:
        ray.train.report({"event": "start", "text": describe(stage, sizes), "step": done, "steps": steps})
    else:
        ray.train.report({})

    accumulation = stage.batch_rows // (world * stage.micro_batch_rows)
    per_rank = stage.micro_batch_rows * accumulation
    max_tokens, image_size = dataset.manifest.max_tokens, model.config.vision_config.image_size
    pad = model.config.text_config.pad_token_id

    def read(rows) -> list[dict]:
        parts = [rows[i : i + stage.micro_batch_rows] for i in range(0, len(rows), stage.micro_batch_rows)]
        return [collate(dataset.rows(part), max_tokens, pad, image_size) for part in parts]

    meter = Meter(world * per_rank * max_tokens)
    model.train()
    stream = prefetch(read, step_indices(dataset, job.seed, per_rank, rank, world, done), job.threads)
    for step, micro_batches in zip(range(done + 1, steps + 1), stream, strict=False):
        loss, tokens = _step(engine, micro_batches, world)
        meter.add(loss, tokens)
        save = step % train.save_every == 0 and step < steps
        if save or step % train.log_every == 0 or step == steps:
            metrics = meter.read(engine, step, steps)
            _check_finite(metrics, stage, step)
            _report(engine, metrics, step, save)
    stream.close()
    export_model(engine, Path(job.start_from), Path(job.export_to), rank)
    ray.train.report({"event": "exported"} if rank == 0 else {})


def deepspeed_config(stage: StageRecipe, train: TrainRecipe) -> dict:
    """DeepSpeed's JSON for a stage. The optimizer is ours, so that its parameter groups are.

    bf16 means autocast over float32 weights: DeepSpeed's own bf16 mode would also round A_log, dt_bias and D.
    """
    accumulation = stage.batch_rows // (train.workers * stage.micro_batch_rows)
    return {
        "train_micro_batch_size_per_gpu": stage.micro_batch_rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": stage.clip,
        "zero_optimization": {"stage": train.zero_stage, "overlap_comm": False},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": train.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


class Meter:
    """Sums what happened since the last report."""

    def __init__(self, positions_per_step: int):
        self._positions = positions_per_step
        self._reset()

    def _reset(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._tokens = 0
        self._start = time.perf_counter()

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        self._losses.append(loss)
        self._tokens += tokens

    def read(self, engine, step: int, steps: int) -> dict:
        """Metrics since the last read; a collective call, because losses are summed over ranks."""
        local = torch.stack([torch.stack(self._losses).sum(), torch.tensor(float(self._tokens))])
        local = local.to(engine.device)
        dist.all_reduce(local)
        seconds, count = time.perf_counter() - self._start, len(self._losses)
        tokens = local[1].item()
        metrics = {
            "event": "metrics",
            "step": step,
            "steps": steps,
            "loss": local[0].item() / count,
            "learning_rate": engine.get_lr()[0],
            "grad_norm": float(engine.get_global_grad_norm() or 0.0),
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds / count,
            "useful_token_share": tokens / (count * self._positions),
            "worker_peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        self._reset()
        return metrics


def _step(engine, micro_batches: list[dict], world: int) -> tuple[torch.Tensor, int]:
    """One optimizer step. Returns this rank's share of the step's mean loss, and its tokens that are no padding.

    Every loss token of the step weighs the same, whatever rank and micro batch it is in: each micro loss is a sum
    divided by the mean number of loss tokens per micro batch, and DeepSpeed averages over ranks and accumulation.
    """
    labels = torch.tensor(float(sum((batch["labels"] != IGNORE_INDEX).sum() for batch in micro_batches)))
    labels = labels.to(engine.device)
    dist.all_reduce(labels)
    mean_count = labels / (world * len(micro_batches))
    total, tokens = torch.zeros((), device=engine.device), 0
    for batch in micro_batches:
        tokens += int(batch.pop("attention_mask").sum())  # padding is a sequence of its own in seq_idx
        batch = {name: value.to(engine.device, non_blocking=True) for name, value in batch.items()}
        loss = engine(**batch, num_items_in_batch=mean_count, logits_to_keep=1, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        total += loss.detach() / (world * len(micro_batches))
    return total, tokens


def _check_finite(metrics: dict, stage: StageRecipe, step: int) -> None:
    if not torch.isfinite(torch.tensor(metrics["loss"])):
        raise FloatingPointError(
            f"stage {stage.name}: the loss is {metrics['loss']} by step {step}; the last checkpoint is from before. "
            f"Lower the stage's learning_rate (now {stage.learning_rate}) or raise its warmup ({stage.warmup})"
        )


def _report(engine, metrics: dict, step: int, save: bool) -> None:
    """Report to the controller, with a checkpoint when `save`. Every rank calls this equally often."""
    rank = dist.get_rank()
    visible = metrics if rank == 0 else {}
    if not save:
        ray.train.report(visible)
        return
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag="zero", client_state={"step": step}, exclude_frozen_parameters=True)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(visible, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:08d}")
    gc.collect()


def _restore(engine) -> int:
    """Load the last complete checkpoint of this stage, if any. Returns the number of steps it had done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        path, state = engine.load_checkpoint(folder, tag="zero", load_module_strict=False)
        if path is None:
            raise RuntimeError(f"checkpoint {os.path.basename(folder)} cannot be loaded; delete it to go on without it")
        dist.barrier()  # inside the block: no rank deletes the folder while another reads it
    return int(state["step"])
