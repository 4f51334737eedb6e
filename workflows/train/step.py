"""One optimizer step from its rows to the update, the metrics between two logs, and when a loss has diverged."""

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from mlmamba.conversation import IGNORE_INDEX
from mlmamba.image_layout import ImageLayout
from mlmamba.positions import Positions, find_positions
from pipelines.augment import Augmentation
from pipelines.reader import PackedDataset, collate
from workflows.recipe.train import StageRecipe, TrainRecipe
from workflows.train.answers import AnswerWeights
from workflows.train.features import Features
from workflows.train.job import StageError
from workflows.train.stage import accumulation


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one worker runs at once, and what their values decide: nothing of it is asked of the device later."""

    inputs: dict[str, torch.Tensor | Positions]
    """What the model's forward takes by these names. Without an attention mask: padding is a sequence of its own."""
    tokens: int
    """Without padding."""
    labels: int
    """Tokens with a label, also those at the start of a sequence."""

    @property
    def predicted(self) -> int:
        """Labels that a token before them predicts, the terms of the loss."""
        return len(self.inputs["positions"].targets)

    def to(self, device: torch.device) -> dict:
        """The inputs on a device; from pinned memory, without waiting for it."""
        kept = ("spatial_shapes",)  # whose values are needed on the host
        return {n: value if n in kept else value.to(device, non_blocking=True) for n, value in self.inputs.items()}


def batch_maker(
    dataset: PackedDataset,
    micro_batch_rows: int,
    model,
    pin: bool = False,
    augment: Augmentation | None = None,
    seed: int = 0,
    weights: AnswerWeights | None = None,
    features: Features | None = None,
) -> Callable:
    """Return a function that turns row indices into a step's micro batches.

    Args:
        model: the MLMambaForConditionalGeneration that will read them.
        pin: put them into pinned memory, from which a GPU copies them while the host goes on.
        augment: how images are changed; as they are by default.
        seed: of these changes, which depend on it, the step, the row and the image's number in it, and on nothing else.
        weights: of the answers in the loss; all the same by default.
        features: of the images, which are then not decoded.
    """
    config, layout = model.config, model.image_layout
    pad = config.text_config.pad_token_id

    def make(rows, counts: list[bool] | None = None, step: int = 0) -> list[MicroBatch]:
        """`counts` says for each row whether its labels do; all, unless it is given."""
        made = []
        for first in range(0, len(rows), micro_batch_rows):
            part = slice(first, first + micro_batch_rows)
            load = augment and partial(_changed, augment, layout, (seed, step), rows[part])
            own = dataset.rows(rows[part])
            batch = collate(own, dataset.manifest.max_tokens, pad, layout, load, decode=features is None)
            if features:
                batch["vision_features"] = features.of([image for row in own for image in row.images])
            if counts is not None:
                without = ~torch.tensor(counts[part])
                batch["labels"][without], batch["attention_mask"][without] = IGNORE_INDEX, False
            made.append(_micro_batch(batch, layout, config, pin, weights))
        return made

    return make


def _changed(augment: Augmentation, layout: ImageLayout, key, rows, data: bytes, pixels: int, place: tuple[int, int]):
    """What `collate` calls for each image: `place` is the number of its row in `rows`, and its own in the row."""
    return augment.load(data, layout, pixels, (*key, int(rows[place[0]]), place[1]))


def _micro_batch(
    batch: dict[str, torch.Tensor], layout: ImageLayout, config, pin: bool, weights: AnswerWeights | None
) -> MicroBatch:
    """What `collate` made, with the labels as positions."""
    labels, seen = batch.pop("labels"), batch.pop("attention_mask")
    if "vision_features" in batch:
        counts = [layout.fixed] * len(batch["vision_features"])
    else:
        counts = layout.counts(batch["pixel_values"], batch.get("spatial_shapes"))
    found = find_positions(batch["input_ids"], labels, batch["seq_idx"], counts, config)
    if weights:
        own = weights.of(labels.numpy(), batch["seq_idx"].numpy())
        found = replace(found, weights=torch.from_numpy(own))
    inputs = {**batch, "positions": found}
    if pin:
        inputs = {name: value.pin_memory() for name, value in inputs.items()}
    return MicroBatch(inputs, int(seen.sum()), int((labels != IGNORE_INDEX).sum()))


def share_of(rows: np.ndarray, rank: int, world: int, stage: StageRecipe) -> tuple[np.ndarray, list[bool] | None]:
    """A worker's rows of a step, and whether each counts; None where all do.

    All workers get as many, in whole micro batches, as DeepSpeed wants it. Where the rows do not divide among them, the
    last ones get a row again that does not count, so that a step is the same with any number of workers.

    Args:
        rows: of the whole step, int64 (rows,) indices.
    """
    each = accumulation(stage, world) * stage.micro_batch_rows
    own = rows[rank * each : (rank + 1) * each]
    if len(own) == each:
        return own, None
    missing = each - len(own)
    return np.concatenate([own, np.repeat(rows[:1], missing)]), [True] * len(own) + [False] * missing


class Notice:
    """Whether any worker has been told that the group is to leave. All ranks hear it after the same step: what each was
    told travels with the step's first sum.

    Args:
        told: whether this worker has been told.
    """

    def __init__(self, told: Callable[[], bool] = lambda: False):
        self._told = told
        self._sum: torch.Tensor | None = None
        self._there: torch.cuda.Event | None = None

    def said(self) -> float:
        """What this worker adds to the sum."""
        return float(self._told())

    def take(self, total: torch.Tensor) -> None:
        """Take the sum over all ranks, without waiting for the device."""
        if total.device.type != "cuda":
            self._sum = total
            return
        self._sum = torch.empty_like(total, device="cpu", pin_memory=True).copy_(total, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def heard(self) -> bool:
        """Whether any worker had been told before this step. On a GPU this waits until it has begun the step."""
        if self._there is not None:
            self._there.synchronize()
        return self._sum is not None and float(self._sum) > 0


def take_step(
    engine, micro_batches: list[MicroBatch], world: int, notice: Notice | None = None
) -> tuple[torch.Tensor, int]:
    """Take one optimizer step. Returns this rank's share of the step's mean loss, and its tokens without padding.

    Every loss token of the step weighs the same, whatever rank and micro batch it is in: each micro loss is a sum
    divided by the mean number of loss tokens per micro batch, and DeepSpeed averages over ranks and accumulation.
    """
    said = notice.said() if notice else 0.0
    sums = torch.tensor([float(sum(batch.labels for batch in micro_batches)), said], device=engine.device)
    dist.all_reduce(sums)
    labels = sums[0]
    if notice:
        notice.take(sums[1])
    mean_count = (labels / (world * len(micro_batches))).clamp(min=1e-9)  # a step without a loss token is worth 0
    total = torch.zeros((), device=engine.device)
    for batch in micro_batches:
        inputs = batch.to(engine.device)
        loss = engine(**inputs, num_items_in_batch=mean_count, logits_to_keep=1, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        total += loss.detach() / (world * len(micro_batches))
    return total, sum(batch.tokens for batch in micro_batches)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank), so that a resumed run draws the same masks."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)


class Meter:
    """Sum losses, tokens and time since the last report.

    Args:
        positions_per_step: tokens that one step has room for, over all ranks.
    """

    def __init__(self, positions_per_step: int):
        self._positions = positions_per_step
        self._reset()

    def _reset(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._tokens = 0
        self._aside = 0.0
        self._start = time.perf_counter()

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        """Count a step: this rank's share of its loss, and this rank's tokens without padding."""
        self._losses.append(loss)
        self._tokens += tokens

    @contextmanager
    def aside(self):
        """Leave the time inside out of the rates, because validation and samples are not training."""
        start = time.perf_counter()
        yield
        self._aside += time.perf_counter() - start

    def read(self, engine, step: int, steps: int) -> dict:
        """Return the metrics since the last read, and begin again. A collective call: losses are summed over ranks.

        Values are read from the device only here, so that no step has to wait for it.
        """
        local = torch.stack([torch.stack(self._losses).sum(), torch.tensor(float(self._tokens), device=engine.device)])
        local = local.double()
        dist.all_reduce(local)
        loss, tokens = local.tolist()
        seconds, count = time.perf_counter() - self._start - self._aside, len(self._losses)
        metrics = {
            "event": "metrics",
            "step": step,
            "steps": steps,
            "loss": loss / count,
            **learning_rates(engine),
            "grad_norm": grad_norm(engine),
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds / count,
            "useful_token_share": tokens / (count * self._positions),
            "worker_peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if engine.device.type == "cuda":
            metrics["gpu_peak_memory_gib"] = torch.cuda.max_memory_allocated(engine.device) / 2**30
        self._reset()
        return metrics


def learning_rates(engine) -> dict[str, float]:
    """Return `learning_rate`, the highest, and one per part where the parts differ."""
    groups = engine.optimizer.param_groups
    rates = {group["part"]: float(group["lr"]) for group in groups}
    each = {f"learning_rate_{part}": rate for part, rate in rates.items()} if len(set(rates.values())) > 1 else {}
    return {"learning_rate": max(rates.values()), **each}


def grad_norm(engine) -> float:
    """Global gradient norm of the last step before clipping; infinite when it overflowed."""
    return float(engine.get_global_grad_norm() or 0.0)


class LossWatch:
    """Decide from the mean loss of each report whether a stage has diverged.

    Args:
        rise: a mean that lies more than this many nats per token over the lowest so far has diverged; None: only a loss
            that is not finite has.
        lowest: the lowest mean so far, from the checkpoint that the stage resumes from.
    """

    def __init__(self, rise: float | None, lowest: float | None = None):
        self.lowest = lowest
        self._rise = rise

    def diverged(self, loss: float) -> str:
        """Check a mean loss. Returns why it has diverged, or "" when it has not."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        lowest = self.lowest
        if self._rise is not None and lowest is not None and loss > lowest + self._rise:
            return f"the loss has risen to {loss:.3f} from {lowest:.3f} (train.max_loss_rise is {self._rise:g})"
        self.lowest = loss if lowest is None else min(loss, lowest)
        return ""


def refuse_device(train: TrainRecipe) -> None:
    """Raises StageError where this worker's GPU does not compute in the recipe's precision."""
    if train.precision != "bf16" or not (train.gpus_per_worker and torch.cuda.is_available()):
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise StageError(f"train.precision is bf16, and {name} does not compute in it: set train.precision=fp32")


@contextmanager
def memory_advice(stage: StageRecipe, train: TrainRecipe, step: int) -> Iterator[None]:
    """A GPU that is out of memory inside the block raises StageError, which says what of the recipe takes less.

    It ends the stage by an error and not as stopped: the other workers wait for this one.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows = stage.micro_batch_rows
        ways = [f"micro_batch_rows of stage {stage.name} ({rows})" if rows > 1 else "the data's max_tokens"]
        ways += [] if train.activation_checkpointing else ["set train.activation_checkpointing=true"]
        ways += [] if train.zero_stage == 3 else [f"raise train.zero_stage ({train.zero_stage})"]
        ways += [] if train.precision == "bf16" else ["set train.precision=bf16"]
        raise StageError(f"the GPU's memory was used up in step {step}: lower {', or '.join(ways)}") from error
