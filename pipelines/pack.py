"""Pass 2: samples to packed rows, and rows to shards.

One plan for the whole split is made on the driver from the samples' lengths alone, so the shards are the same however
many machines write them. Each shard is one Ray task: it reads its samples from the token files (each file opened once,
only the samples it needs), holds them in memory, and writes the shard.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from mlmamba.conversation import IGNORE_INDEX
from pipelines import storage
from pipelines.dedup import Removals
from pipelines.execution import run_tasks
from pipelines.manifest import ShardInfo
from pipelines.planner import plan_rows
from pipelines.records import Partition
from pipelines.schema import PACKED, PACKED_VERSION, one_row, values
from pipelines.tokenize import iter_outcomes

_SCHEMA = PACKED.with_metadata({"mlmamba.schema_version": str(PACKED_VERSION)})


def shard_tasks(
    partitions: list[Partition],
    max_tokens: int,
    shard_rows: int,
    seed: int,
    work: str,
    out: str,
    removals: Removals | None = None,
) -> list[dict]:
    """Plan one split: a task description for each of its shards.

    Args:
        partitions: of one split, in order, all tokenized.
        max_tokens: length of a row.
        shard_rows: rows in a shard; the last one may have fewer.
        seed: of the plan.
        work: folder of the partitions' files.
        out: folder of the data set.
        removals: tokenized records that are not used.
    """
    owners, places, lengths = _read_lengths(partitions, work, removals or Removals())
    rows = plan_rows(lengths, max_tokens, seed)
    tasks = []
    for index, start in enumerate(range(0, len(rows), shard_rows)):
        shard = rows[start : start + shard_rows]
        used = sorted({int(owners[sample]) for row in shard for sample in row})
        position = {owner: i for i, owner in enumerate(used)}
        name = f"{partitions[0].split}-{index:05d}"
        task = {
            "path": f"shards/{name}.arrow",
            "out": out,
            "report": storage.join(work, "packed", f"{name}.json"),
            "tokens": [partitions[owner].tokens_file(work) for owner in used],
            # Every sample as (position in `tokens`, record batch in that file).
            "rows": [[(position[int(owners[sample])], int(places[sample])) for sample in row] for row in shard],
        }
        inputs = [PACKED_VERSION, [partitions[owner].digest for owner in used], task["rows"]]
        tasks.append(task | {"digest": hashlib.sha256(json.dumps(inputs).encode()).hexdigest()})
    return tasks


def pack(tasks: list[dict]) -> Iterator[tuple[ShardInfo, bool]]:
    """Write the shards on Ray. Yields each one's facts as it completes, and whether an earlier run had written it."""
    for result in run_tasks(pack_shard, tasks):
        yield ShardInfo(**result["shard"]), result["skipped"]


def pack_shard(task: dict) -> dict:
    """Write one shard, unless it is done, and return its facts. Runs inside a Ray task."""
    uri = storage.join(task["out"], task["path"])
    if storage.exists(task["report"]):
        report = json.loads(storage.read_bytes(task["report"]))
        if report["digest"] == task["digest"] and storage.size(uri) == report["shard"]["bytes"]:
            return {"shard": report["shard"], "skipped": True}
    samples = _gather(task["tokens"], task["rows"])
    facts = Counter()
    sources = Counter()
    with storage.atomic_file(uri) as path:
        with pa.output_stream(path, buffer_size=storage.WRITE_BUFFER) as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            for places in task["rows"]:
                row = _join([samples[tuple(place)] for place in places])
                writer.write_batch(one_row(_SCHEMA, row))
                sources.update(row["source"])
                facts["samples"] += len(row["sample_ids"])
                facts["tokens"] += len(row["input_ids"])
                facts["loss_tokens"] += int((row["labels"] != IGNORE_INDEX).sum())
                facts["images"] += len(row["images"])
        size, sha256 = storage.checksum(path)
    shard = ShardInfo(
        path=task["path"],
        rows=len(task["rows"]),
        bytes=size,
        sha256=sha256,
        samples_by_source=dict(sorted(sources.items())),
        **facts,
    ).model_dump()
    storage.write_atomic(task["report"], json.dumps({"digest": task["digest"], "shard": shard}).encode())
    return {"shard": shard, "skipped": False}


def _read_lengths(
    partitions: list[Partition], work: str, removals: Removals
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every sample of a split, in order: its partition, its record batch in that token file, its length."""
    owners, places, lengths = [], [], []
    for owner, (partition, outcomes) in enumerate(iter_outcomes(partitions, work, ["length", "reason"])):
        tokenized = outcomes["reason"].is_null().to_numpy()
        kept = tokenized.copy()
        kept[list(removals.of(partition.name))] = False
        owners.append(np.full(kept.sum(), owner, dtype=np.int32))
        places.append((np.cumsum(tokenized) - 1)[kept].astype(np.int32))
        lengths.append(outcomes["length"].to_numpy()[kept])
    empty = np.zeros(0, dtype=np.int32)
    return tuple(np.concatenate([empty, *parts]) for parts in (owners, places, lengths))


def _gather(files: list[str], rows: list[list[tuple[int, int]]]) -> dict[tuple[int, int], dict]:
    """The samples of a shard, copied out of the token files so that only one of those is open at a time."""
    wanted = sorted({tuple(place) for row in rows for place in row})
    samples, opened, reader = {}, None, None
    for file, batch_index in wanted:
        if file != opened:
            reader, opened = storage.open_arrow(files[file], mapped=False), file
        batch = reader.get_batch(batch_index)
        samples[file, batch_index] = {
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
