"""Reading a finished data set: any row, any step of any rank, without replaying what came before.

The order of rows is a function of (seed, epoch), so step s is found by arithmetic: it takes the s-th block of
`world_size * batch_rows` rows. What does not fill a block at the end of an epoch is left out of that epoch.

Memory stays bounded however large the set is. Shards on a local disk are memory-mapped; of those in an object store a
row is fetched when it is asked for, in one request. At most `OPEN_SHARDS` are open, each with its table of contents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
import pyarrow as pa

from mlmamba.image_colours import PIXELS
from pipelines import storage
from pipelines.manifest import Manifest
from pipelines.schema import values
from pipelines.shard_check import ShardCheck
from pipelines.shuffle import permutation

OPEN_SHARDS = 128  # each takes a file descriptor


@dataclass(frozen=True)
class PackedRow:
    """One training row. `T` tokens, `S` samples, `P` images; arrays are read-only views of the shard."""

    sample_ids: list[str]
    """(S,)"""
    input_ids: np.ndarray
    """int32 (T,)"""
    labels: np.ndarray
    """int32 (T,), IGNORE_INDEX where there is no loss."""
    seq_idx: np.ndarray
    """int32 (T,), the sample each token belongs to: 0, 1, 2, ..."""
    images: list[bytes]
    """(P,) encoded images."""
    image_positions: np.ndarray
    """int32 (P,), index of the first token of each image."""
    source: list[str]
    """(S,)"""
    pixels: int = PIXELS
    """Version of the rules by which the images become RGB."""


class PackedDataset:
    """The packed rows of one split. Rows may be read in several threads at once.

    Args:
        uri: folder of the data set, path or URI.
        split: "train" or "validation".
        check: compare each shard with its sha256 before the first row of it is read, once on each machine
            (pipelines/shard_check.py). Reading rows then raises ShardDamaged.

    Raises:
        FileNotFoundError: the data set is not finished.
        ValueError: it has no such split.
    """

    def __init__(self, uri: str, split: str = "train", check: bool = False):
        self.manifest = Manifest.load(uri)
        if split not in self.manifest.splits:
            has = ", ".join(self.manifest.splits)
            give = ": give the recipe data.validation, or a training source `validation: 0.1`"
            remedy = give if split == "validation" else ""
            raise ValueError(f"the data set {storage.shown(uri)} has no split {split!r}, it has {has}{remedy}")
        shards = self.manifest.splits[split].shards
        self._ends = np.cumsum([shard.rows for shard in shards])
        files = [storage.join(uri, shard.path) for shard in shards]
        checker = ShardCheck(uri)
        self.checks = check and checker.possible

        @lru_cache(maxsize=OPEN_SHARDS)
        def open_shard(shard: int) -> tuple[pa.ipc.RecordBatchFileReader, Lock]:
            if self.checks:
                checker.check(shards[shard])
            return storage.open_arrow(files[shard]), Lock()

        self._open_shard = open_shard

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> PackedRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a data set of {len(self)} rows")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        reader, alone = self._open_shard(shard)
        with alone:  # rows are read in several threads, and Arrow does not say that one reader may be shared
            batch = reader.get_batch(int(index) - first)
        lists = {name: values(batch, name).to_pylist() for name in ("sample_ids", "images", "source")}
        arrays = {
            name: values(batch, name).to_numpy() for name in ("input_ids", "labels", "seq_idx", "image_positions")
        }
        return PackedRow(**lists, **arrays, pixels=self.manifest.pixels)

    def rows(self, indices: np.ndarray) -> list[PackedRow]:
        """Several rows."""
        return [self[int(index)] for index in indices]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Row indices in the order of an epoch, int64 (rows,)."""
        return permutation(len(self), seed, epoch, "epoch")


def step_indices(
    dataset: PackedDataset, seed: int, batch_rows: int, rank: int, world_size: int, start_step: int = 0
) -> Iterator[np.ndarray]:
    """The rows of one rank's batches, without end, from a step on; int64 (batch_rows,) indices. Reads no rows.

    Args:
        dataset: the same on all ranks.
        seed: the same on all ranks.
        batch_rows: rows per rank and step.
        rank: of `world_size`.
        world_size: ranks that share each step's rows.
        start_step: number of steps already taken.

    Raises:
        ValueError: the ranks' first batch already needs more rows than there are, or the numbers make no sense.
    """
    if not (batch_rows >= 1 and 0 <= rank < world_size and start_step >= 0):
        raise ValueError(f"no such batch: batch_rows={batch_rows}, rank={rank} of {world_size}, step {start_step}")
    per_step = world_size * batch_rows
    steps_per_epoch = len(dataset) // per_step
    if steps_per_epoch == 0:
        raise ValueError(
            f"one step takes {world_size} ranks x {batch_rows} rows = {per_step} rows, the data set has "
            f"{len(dataset)}: lower the batch size or the number of workers, or prepare more data"
        )

    def generate() -> Iterator[np.ndarray]:
        step, epoch, order = start_step, -1, None
        while True:
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                order = dataset.order(seed, epoch)
            first = (step % steps_per_epoch) * per_step + rank * batch_rows
            yield order[first : first + batch_rows]
            step += 1

    return generate()


def batches(
    dataset: PackedDataset, seed: int, batch_rows: int, rank: int, world_size: int, start_step: int = 0
) -> Iterator[list[PackedRow]]:
    """The rows themselves; arguments and errors are those of `step_indices`."""
    return map(dataset.rows, step_indices(dataset, seed, batch_rows, rank, world_size, start_step))
