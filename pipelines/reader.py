"""What training needs of a data set: rows of any step, their tensors, and the next ones made in the background.

dataset = PackedDataset(uri)
make = lambda indices: collate(dataset.rows(indices), max_tokens, pad_id, layout)
for batch in prefetch(make, step_indices(dataset, seed, batch_rows, rank, world_size, start_step), threads):
    ...
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from mlmamba.conversation import IGNORE_INDEX
from mlmamba.image_layout import CutImage, ImageLayout
from pipelines.packed import PackedDataset, PackedRow, batches, step_indices

__all__ = ["PackedDataset", "PackedRow", "batches", "collate", "prefetch", "step_indices"]

T = TypeVar("T")
R = TypeVar("R")


def collate(
    rows: list[PackedRow],
    max_tokens: int,
    pad_id: int,
    layout: ImageLayout,
    load: Callable[[bytes, int, tuple[int, int]], CutImage] | None = None,
    decode: bool = True,
) -> dict[str, torch.Tensor]:
    """Pad rows to one length and decode their images.

    Args:
        rows: B rows.
        max_tokens: L, the length of every batch, so that shapes never change and kernels compile once.
        pad_id: id in the padding. It may be that of a real token (GPT-NeoX pads with its end token): the mask and
            the labels say what is padding, the ids do not.
        layout: how images are cut for the encoder.
        load: cuts an encoded image, given the version of the rules, and where it is shown: the number of its row among
            these, and its own in the row. By default it is shown as it is.
        decode: without it there are no pixels.

    Returns:
        `input_ids` int64 (B, L), `labels` int64 (B, L) with IGNORE_INDEX on padding, `seq_idx` int32 (B, L) where
        padding is one more sequence, `attention_mask` bool (B, L), and the images of all rows in reading order, as
        `ImageLayout.batch` gives them: `pixel_values` uint8 (N, 3, S, S), or patches with their `spatial_shapes`.

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
    batch = {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "seq_idx": torch.from_numpy(seq_idx),
        "attention_mask": torch.from_numpy(mask),
    }
    if not decode:
        return batch
    load = load or (lambda data, version, _: layout.load(data, version))
    images = [load(data, row.pixels, (i, k)) for i, row in enumerate(rows) for k, data in enumerate(row.images)]
    return {**batch, **layout.batch(images)}


def prefetch(function: Callable[[T], R], items: Iterable[T], threads: int = 2, depth: int | None = None) -> Iterator[R]:
    """`map(function, items)` with the next results made in background threads.

    Results, their order and an error of the function are those of `map`. Decoding images and reading files release
    the interpreter lock, so threads are enough. Closing the generator ends the threads.

    Args:
        function: called in several threads at once.
        items: taken in the caller's thread, so they should cost nothing.
        threads: how many.
        depth: results made ahead at most, which bounds the memory; one more than `threads` unless given.
    """
    depth = threads + 1 if depth is None else depth
    if threads < 1 or depth < 1:
        raise ValueError(f"prefetch with {threads} threads and depth {depth}, expected at least 1 of each")

    def generate() -> Iterator[R]:
        pending: deque[Future] = deque()
        pool = ThreadPoolExecutor(threads, "prefetch")
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return generate()
