"""Pass 2: samples to packed rows, and rows to shards.

The plan is made from the samples' lengths alone, so the shards are the same however many machines write them. One task
plans up to `plan.SEGMENT` samples. Each shard is one Ray task: it reads its samples from the token files, holds them in
memory, and writes the shard.
"""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa

from mlmamba.conversation import IGNORE_INDEX
from pipelines import storage
from pipelines.execution import run_tasks
from pipelines.manifest import ShardInfo
from pipelines.plan import PlannedShard, read_plan
from pipelines.records import name_of, tokens_file
from pipelines.schema import PACKED, PACKED_VERSION, one_row, values

_FILES_AT_ONCE = 16
_SCHEMA = PACKED.with_metadata({"mlmamba.schema_version": str(PACKED_VERSION)})


def shard_number(path: str) -> int:
    """The place of a shard in its split, from its path."""
    return int(path.rpartition("-")[2].removesuffix(".arrow"))


def pack(shards: dict[str, list[PlannedShard]], work: str, out: str) -> Iterator[tuple[str, ShardInfo, bool]]:
    """Write the shards on Ray.

    Args:
        shards: of each split, in row order.
        work: folder of the partitions' files.
        out: folder of the data set.

    Yields:
        Split and facts of each shard as it completes, and whether an earlier run had written it.
    """
    tasks = (
        {
            "split": split,
            "path": f"shards/{name_of(split, index)}.arrow",
            "out": out,
            "work": work,
            "report": storage.join(work, "packed", f"{name_of(split, index)}.json"),
            "plan": shard.file,
            "batch": shard.batch,
            "digest": shard.digest,
        }
        for split, own in shards.items()
        for index, shard in enumerate(own)
    )
    for result in run_tasks(pack_shard, tasks, "Pack"):
        yield result["split"], ShardInfo(**result["shard"]), result["skipped"]


def pack_shard(task: dict) -> dict:
    """Write one shard, unless it is done, and return its facts. Runs inside a Ray task."""
    uri = storage.join(task["out"], task["path"])
    if storage.exists(task["report"]):
        report = json.loads(storage.read_bytes(task["report"]))
        if report["digest"] == task["digest"] and storage.size(uri) == report["shard"]["bytes"]:
            return {"split": task["split"], "shard": report["shard"], "skipped": True}
    rows = read_plan(task["plan"], task["batch"])
    samples = _gather(task["work"], task["split"], np.concatenate(rows))
    facts = Counter()
    sources = Counter()
    with storage.atomic_file(uri) as path:
        with pa.output_stream(path, buffer_size=storage.WRITE_BUFFER) as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            for places in rows:
                row = _join([samples[tuple(place)] for place in places.tolist()])
                writer.write_batch(one_row(_SCHEMA, row))
                sources.update(row["source"])
                facts["samples"] += len(row["sample_ids"])
                facts["tokens"] += len(row["input_ids"])
                facts["loss_tokens"] += int((row["labels"] != IGNORE_INDEX).sum())
                facts["images"] += len(row["images"])
        size, sha256 = storage.checksum(path)
    shard = ShardInfo(
        path=task["path"],
        rows=len(rows),
        bytes=size,
        sha256=sha256,
        samples_by_source=dict(sorted(sources.items())),
        **facts,
    ).model_dump()
    storage.write_atomic(task["report"], json.dumps({"digest": task["digest"], "shard": shard}).encode())
    return {"split": task["split"], "shard": shard, "skipped": False}


def _gather(work: str, split: str, places: np.ndarray) -> dict[tuple[int, int], dict]:
    """The samples of a shard, copied out of the token files.

    Each file that has one of them is opened once, so at most as many as there are samples, however large the corpus.
    From an object store `_FILES_AT_ONCE` are read at a time, because reading is mostly waiting there. Local ones are
    read without a thread: its memory would go back to the system after each shard, and to get it anew took as much time
    as all else in this pass.
    """
    places = np.unique(places, axis=0)
    parts = np.split(places, np.flatnonzero(np.diff(places[:, 0])) + 1)
    read = partial(_read_samples, work, split)
    if storage.is_local(work):
        found = [read(part) for part in parts]
    else:
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            found = list(pool.map(read, parts))
    return {place: sample for samples in found for place, sample in samples.items()}


def _read_samples(work: str, split: str, places: np.ndarray) -> dict[tuple[int, int], dict]:
    """Samples of one token file."""
    samples, owner = {}, int(places[0, 0])
    reader = storage.open_arrow(tokens_file(work, name_of(split, owner)), mapped=False)
    for index in places[:, 1].tolist():
        batch = reader.get_batch(index)
        samples[owner, index] = {
            "record_id": batch["record_id"][0].as_py(),
            "source": batch["source"][0].as_py(),
            "images": values(batch, "images").to_pylist(),
            **{name: values(batch, name).to_numpy().copy() for name in ("input_ids", "labels", "image_positions")},
        }
    return samples


def _join(samples: list[dict]) -> dict:
    """One packed row from its samples, as columns of schema.PACKED."""
    for sample in samples:
        # The loss of a row's token is that of predicting it from the one before: a sample whose first token had a
        # label would be trained to follow from its neighbour.
        if sample["labels"][0] != IGNORE_INDEX:
            raise AssertionError(f"sample {sample['record_id']} starts with a label; the row's loss would leak into it")
    starts = np.cumsum([0] + [len(sample["input_ids"]) for sample in samples])
    return {
        "sample_ids": [sample["record_id"] for sample in samples],
        "input_ids": np.concatenate([sample["input_ids"] for sample in samples]),
        "labels": np.concatenate([sample["labels"] for sample in samples]),
        "seq_idx": np.repeat(np.arange(len(samples), dtype=np.int32), np.diff(starts)),
        "images": [image for sample in samples for image in sample["images"]],
        "image_positions": np.concatenate(
            [sample["image_positions"] + start for sample, start in zip(samples, starts, strict=False)]
        ),
        "source": [sample["source"] for sample in samples],
    }
