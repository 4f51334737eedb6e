"""What training needs of a data set: rows of any step, their tensors, and the next ones made in the background.

dataset = PackedDataset(uri)
steps = batches(dataset, seed, batch_rows, rank, world_size, start_step)
for batch in prefetch(collate(rows, max_tokens, pad_id, image_size) for rows in steps):
    ...
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch

from mlmamba.conversation import IGNORE_INDEX
from mlmamba.pictures import load_pixels
from pipelines.packed import PackedDataset, PackedRow, batches

__all__ = ["PackedDataset", "PackedRow", "batches", "collate", "prefetch"]

T = TypeVar("T")
_END = object()


def collate(rows: list[PackedRow], max_tokens: int, pad_id: int, image_size: int) -> dict[str, torch.Tensor]:
    """Pad rows to one length and decode their pictures.

    Args:
        rows: B rows.
        max_tokens: L, the length of every batch, so that shapes never change and kernels compile once.
        pad_id: id in the padding. It may be that of a real token (GPT-NeoX pads with its end token): the mask and
            the labels say what is padding, the ids do not.
        image_size: S, side in pixels of the encoder's input.

    Returns:
        `input_ids` int64 (B, L), `labels` int64 (B, L) with IGNORE_INDEX on padding, `seq_idx` int32 (B, L) where
        padding is one more sequence, `attention_mask` bool (B, L), `pixel_values` uint8 (N, 3, S, S) with the pictures
        of all rows in reading order.

    Raises:
        ValueError: a row is longer than `max_tokens`.
    """
    shape = (len(rows), max_tokens)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    seq_idx = np.zeros(shape, dtype=np.int32)
    mask = np.zeros(shape, dtype=bool)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        if n > max_tokens:
            raise ValueError(f"a row has {n} tokens, over max_tokens = {max_tokens}: use the data set's max_tokens")
        input_ids[i, :n], labels[i, :n], mask[i, :n] = row.input_ids, row.labels, True
        seq_idx[i, :n], seq_idx[i, n:] = row.seq_idx, row.seq_idx[-1] + 1
    pixels = [load_pixels(data, image_size) for row in rows for data in row.images]
    stacked = np.stack(pixels) if pixels else np.zeros((0, 3, image_size, image_size), dtype=np.uint8)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "seq_idx": torch.from_numpy(seq_idx),
        "attention_mask": torch.from_numpy(mask),
        "pixel_values": torch.from_numpy(stacked),
    }


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Run an iterator in a background thread, at most `depth` items ahead.

    The items, their order and any error are those of the iterator. Hand it the finished work, as in
    `prefetch(collate(rows, ...) for rows in batches(...))`, so that decoding happens in the thread. Closing the
    generator ends the thread.
    """
    if depth < 1:
        raise ValueError(f"prefetch depth is {depth}, expected at least 1")
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(entry: tuple) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:  # handed to the consumer, who is the one to raise it
            put((_END, error))

    def generate() -> Iterator[T]:
        threading.Thread(target=work, name="prefetch", daemon=True).start()
        try:
            while True:
                item, error = ready.get()
                if error is not None:
                    raise error
                if item is _END:
                    return
                yield item
        finally:
            stop.set()

    return generate()
