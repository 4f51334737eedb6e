"""The loss on the validation split, while a stage trains."""

import torch
import torch.distributed as dist

from mlmamba.conversation import IGNORE_INDEX
from pipelines.reader import PackedDataset
from workflows.train.step import batch_maker, to_device


class HeldOut:
    """Measures the mean loss per token over the first rows of the validation split; collective calls.

    Args:
        data: folder of the data set.
        rows: how many rows at most.
        micro_batch_rows: rows that one worker runs at once.
    """

    def __init__(self, data: str, rows: int, micro_batch_rows: int, pad_id: int, image_size: int):
        dataset = PackedDataset(data, "validation")
        self._rows = min(rows, len(dataset))
        self._micro = micro_batch_rows
        self._make = batch_maker(dataset, micro_batch_rows, pad_id, image_size)

    def loss(self, engine, rank: int, world: int) -> float:
        """Mean loss per loss token. All ranks run equally many batches, as ZeRO-3 wants it."""
        per_pass = world * self._micro
        sums = torch.zeros(2, device=engine.device, dtype=torch.float64)
        engine.eval()
        with torch.no_grad():
            for first in range(0, self._rows, per_pass):
                mine = range(first + rank * self._micro, first + (rank + 1) * self._micro)
                (batch,) = self._make([min(row, self._rows - 1) for row in mine])
                inputs, _ = to_device(batch, engine.device)
                for place, row in enumerate(mine):
                    if row >= self._rows:  # a row more than there are stands in for it, and does not count
                        inputs["labels"][place] = IGNORE_INDEX
                # A label at the start of a sequence has no token before it that could predict it.
                labels, sequences = inputs["labels"], inputs["seq_idx"]
                counted = (labels[:, 1:] != IGNORE_INDEX) & (sequences[:, 1:] == sequences[:, :-1])
                one = torch.ones((), device=engine.device)
                total = engine(**inputs, num_items_in_batch=one, logits_to_keep=1, use_cache=False).loss
                sums += torch.stack([total.double(), counted.sum().double()])
        engine.train()
        dist.all_reduce(sums)
        return (sums[0] / sums[1].clamp(min=1)).item()
