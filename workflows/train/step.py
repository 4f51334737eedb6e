"""One optimizer step: the micro batches of its rows, their way to the device, and the step itself."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from mlmamba.conversation import IGNORE_INDEX
from pipelines.reader import PackedDataset, collate


def batch_maker(dataset: PackedDataset, micro_batch_rows: int, pad_id: int, image_size: int) -> Callable:
    """Return a function that turns row indices into a step's micro batches, as `collate` makes them."""

    def make(rows) -> list[dict]:
        parts = [rows[i : i + micro_batch_rows] for i in range(0, len(rows), micro_batch_rows)]
        return [collate(dataset.rows(part), dataset.manifest.max_tokens, pad_id, image_size) for part in parts]

    return make


def to_device(batch: dict, device: torch.device) -> tuple[dict, int]:
    """Move a micro batch to the device. Returns the model's inputs, and the number of tokens without padding.

    The attention mask is left out, because padding is a sequence of its own in seq_idx.
    """
    tokens = int(batch["attention_mask"].sum())
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items() if name != "attention_mask"}
    return moved, tokens


def take_step(engine, micro_batches: list[dict], world: int) -> tuple[torch.Tensor, int]:
    """Take one optimizer step. Returns this rank's share of the step's mean loss, and its tokens without padding.

    Every loss token of the step weighs the same, whatever rank and micro batch it is in: each micro loss is a sum
    divided by the mean number of loss tokens per micro batch, and DeepSpeed averages over ranks and accumulation.
    """
    labels = torch.tensor(float(sum((batch["labels"] != IGNORE_INDEX).sum() for batch in micro_batches)))
    labels = labels.to(engine.device)
    dist.all_reduce(labels)
    mean_count = (labels / (world * len(micro_batches))).clamp(min=1e-9)  # a step without a loss token is worth 0
    total, tokens = torch.zeros((), device=engine.device), 0
    for batch in micro_batches:
        inputs, count = to_device(batch, engine.device)
        loss = engine(**inputs, num_items_in_batch=mean_count, logits_to_keep=1, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        total += loss.detach() / (world * len(micro_batches))
        tokens += count
    return total, tokens


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank), so that a resumed run draws the same masks."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)
