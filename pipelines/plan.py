"""What becomes of the records of both passes, settled by groups of partitions, and the plan of the shards.

    work/settled/SPLIT-GROUP.arrow       the group's samples (_SAMPLES), and the digests of its partitions
    work/settled/SPLIT-GROUP.quarantine  its part of the quarantine table, as JSON lines
    work/plan/SPLIT-SEGMENT.arrow        rows of the shards (_PLAN), a record batch for each shard

Samples are shuffled and then planned in segments of up to `SEGMENT`, a task each: which samples are in a segment
follows from the shuffle, so a set of up to that size has the plan that it always had, and a larger one takes no more
memory anywhere. A task reads the lengths of all samples, 12 bytes each, and keeps those of its segment.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.dedup import removed
from pipelines.execution import run_tasks
from pipelines.planner import plan_rows
from pipelines.quarantine import Tally, settle
from pipelines.records import Group, outcomes_file
from pipelines.schema import PACKED_VERSION
from pipelines.shuffle import hashes
from pipelines.tokenize import partition_digest

SEGMENT = 1 << 20  # samples
_SAMPLES = pa.schema([("owner", pa.int32()), ("place", pa.int32()), ("length", pa.int32())])
_PLAN = pa.schema([("row", pa.int32()), ("owner", pa.int32()), ("place", pa.int32())])
_DIGESTS_KEY = b"mlmamba.digests"


class PlannedShard(NamedTuple):
    """Where the rows of a shard stand."""

    file: str
    batch: int
    """Record batch in the file."""
    rows: int
    digest: str
    """Changes with anything that the shard depends on."""


def settle_groups(groups: dict[str, list[Group]], search: dict[str, dict], work: str) -> dict[str, Tally]:
    """Settle what became of all records, on Ray.

    Args:
        groups: of tokenized partitions, by split.
        search: how `find_removals` looked for duplicates, by split.
        work: folder of their files.
    """
    tasks = (
        {"number": group.number, "first": group.first, "count": group.count} | search[split]
        for split, own in groups.items()
        for group in own
    )
    found = {
        (result["split"], result["number"]): result["tally"] for result in run_tasks(settle_group, tasks, "Settle")
    }
    tallies: dict[str, Tally] = {split: Tally() for split in groups}
    for split, number in sorted(found):
        tallies[split].add(found[split, number])
    return tallies


def read_bad(groups: dict[str, list[Group]], work: str) -> Iterator[list[dict]]:
    """The rows of the quarantine table, group by group."""
    for own in groups.values():
        for group in own:
            place = {"split": group.split, "number": group.number}
            yield [json.loads(line) for line in storage.read_bytes(_bad_file(work, place)).splitlines()]


def plan_shards(
    groups: dict[str, list[Group]],
    samples: dict[str, int],
    max_tokens: int,
    shard_rows: int,
    seed: int,
    work: str,
) -> dict[str, list[PlannedShard]]:
    """Plan the shards of all splits, on Ray.

    Args:
        groups: settled, by split.
        samples: that are used, by split.
        max_tokens: length of a row.
        shard_rows: rows in a shard; the last one of a segment may have fewer.
        seed: of the plan.
        work: folder of the partitions' files.

    Returns:
        Each split's shards in row order.
    """
    tasks = []
    for split, own in groups.items():
        of = -(-samples[split] // SEGMENT)
        task = {"split": split, "groups": len(own), "segments": of, "work": work, "seed": seed}
        task |= {"max_tokens": max_tokens, "rows": shard_rows}
        tasks += [
            task | {"segment": segment, "file": storage.join(work, "plan", f"{split}-{segment:05d}.arrow")}
            for segment in range(of)
        ]
    found = {(result["split"], result["segment"]): result for result in run_tasks(plan_segment, tasks, "Plan")}
    planned: dict[str, list[PlannedShard]] = {split: [] for split in groups}
    for task in tasks:
        for batch, (rows, digest) in enumerate(found[task["split"], task["segment"]]["shards"]):
            planned[task["split"]].append(PlannedShard(task["file"], batch, rows, digest))
    return planned


def read_plan(file: str, batch: int) -> list[np.ndarray]:
    """The rows of a shard: for each the (partition, record batch) of its samples, int32 (samples, 2)."""
    table = storage.open_arrow(file).get_batch(batch)
    rows, owners, places = (table[name].to_numpy() for name in _PLAN.names)
    return np.split(np.stack([owners, places], axis=1), np.flatnonzero(np.diff(rows)) + 1)


def settle_group(task: dict) -> dict:
    """Settle a group of partitions. Runs inside a Ray task."""
    group, work = Group(task["split"], task["number"], task["first"], task["count"]), task["work"]
    settled = settle(group.split, group.first, group.names, work, removed(task, task["steps"]))
    digests = [partition_digest(outcomes_file(work, name)) for name in group.names]
    schema = _SAMPLES.with_metadata({_DIGESTS_KEY: json.dumps(digests)})
    storage.write_table(_samples_file(task, group.number), pa.table(settled.samples, schema=schema))
    storage.write_atomic(_bad_file(work, task), "\n".join(map(json.dumps, settled.bad)))
    return {"split": group.split, "number": group.number, "tally": settled.tally.to_json()}


def plan_segment(task: dict) -> dict:
    """Plan the rows of a segment, and write them by shard. Runs inside a Ray task."""
    parts, digests, ranks, start = [], [], [], 0
    for group in range(task["groups"]):
        table = storage.open_arrow(_samples_file(task, group)).read_all()
        digests += json.loads(table.schema.metadata[_DIGESTS_KEY])
        shuffled = hashes(start, start + len(table), task["seed"], "samples")
        start += len(table)
        if task["segments"] > 1:
            mine = (shuffled >> np.uint64(32)) * np.uint64(task["segments"]) >> np.uint64(32)
            chosen = np.flatnonzero(mine == task["segment"])
            table, shuffled = table.take(pa.array(chosen)), shuffled[chosen]
        parts.append([table[name].to_numpy() for name in _SAMPLES.names])
        ranks.append(shuffled)
    owners, places, lengths = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(np.concatenate(ranks), kind="stable")
    rows = plan_rows(lengths, task["max_tokens"], task["seed"], order=order, part=task["segment"])
    shards = []
    with (
        storage.atomic_file(task["file"]) as path,
        pa.OSFile(path, "wb") as sink,
        pa.ipc.new_file(sink, _PLAN) as writer,
    ):
        for first in range(0, len(rows), task["rows"]):
            own = rows[first : first + task["rows"]]
            samples = np.concatenate(own)
            numbers = np.repeat(np.arange(len(own), dtype=np.int32), [len(row) for row in own])
            columns = [numbers, owners[samples], places[samples]]
            writer.write_batch(pa.record_batch([pa.array(column) for column in columns], schema=_PLAN))
            used = [digests[owner] for owner in np.unique(owners[samples]).tolist()]
            inputs = hashlib.sha256(json.dumps([PACKED_VERSION, used]).encode())
            for column in columns:
                inputs.update(np.ascontiguousarray(column).tobytes())
            shards.append([len(own), inputs.hexdigest()])
    return {"split": task["split"], "segment": task["segment"], "shards": shards}


def _samples_file(task: dict, group: int) -> str:
    return storage.join(task["work"], "settled", f"{task['split']}-{group:05d}.arrow")


def _bad_file(work: str, group: dict) -> str:
    return storage.join(work, "settled", f"{group['split']}-{group['number']:05d}.quarantine")
