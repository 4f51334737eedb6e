"""Which tokenized records are not used: those with an id or content that came before, and those with the image of an
evaluation set.

It is decided between the two passes from digests that pass 1 left, in the order in which the sources list the records:
the first one stays. So the decision does not depend on how the work was divided. Equal digests have to meet in one
place: a task for a group of partitions spreads its digests over buckets, a task for a bucket finds those that came
before. Ids come first and then content: a record that is not used because of its id is not the first of its content.

    work/removed/images-SPLIT-GROUP.arrow   records of a group with an image of an evaluation set (REMOVED)
    work/keys/ID-SPLIT-GROUP.arrow          digests of a group, a record batch for each bucket (_KEYS)
    work/removed/ID-SPLIT-BUCKET.arrow      records that are not used, a record batch for each group

A bucket's task takes some 150 bytes of memory a record of `_BUCKET`.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.exclusion import Excluded
from pipelines.execution import run_tasks
from pipelines.records import Group
from pipelines.schema import DIGEST_BYTES
from pipelines.tokenize import iter_outcomes

CONTAMINATED, DUPLICATE_ID, DUPLICATE_CONTENT = "contaminated", "duplicate_id", "duplicate_content"
NEAR = "near_contaminated"
Near = dict[str, list[tuple[int, str]]]
"""Records whose images look like one of an evaluation set: by partition, rows and what is said of each."""
REMOVED = pa.schema([("owner", pa.int32()), ("row", pa.int32()), ("reason", pa.string()), ("detail", pa.string())])
"""A record that is not used: number of its partition in the split, row in the outcomes, and why."""
_KEYS = pa.schema(
    [
        ("key", pa.binary(DIGEST_BYTES)),
        ("owner", pa.int32()),
        ("row", pa.int32()),
        ("record_id", pa.string()),
        ("source", pa.string()),
    ]
)
_BUCKET = 1 << 21  # records
_STEPS = (("id", DUPLICATE_ID, "the id of"), ("content", DUPLICATE_CONTENT, "the same images and text as"))


def find_removals(
    groups: dict[str, list[Group]],
    records: dict[str, int],
    work: str,
    excluded: Excluded,
    deduplicate: bool,
    near: Near | None = None,
) -> dict[str, dict]:
    """Decide for all splits, on Ray, and leave the decisions in files.

    Args:
        groups: of tokenized partitions, by split.
        records: how many, by split.
        work: folder of their files.
        excluded: images that the train split must not show.
        deduplicate: whether records of one content are removed; those of one id always are.
        near: training images that look like one of `excluded`.

    Returns:
        By split, what `removed` needs to find the decisions.
    """
    steps = [step[0] for step in _STEPS[: 2 if deduplicate else 1]]
    search = {
        split: {"split": split, "work": work, "groups": len(own), "steps": steps}
        | {"buckets": -(-records[split] // _BUCKET) or 1}
        for split, own in groups.items()
    }
    images = None
    if excluded:
        file = storage.join(work, "removed", "excluded.arrow")
        excluded.save(file)
        images = [file, storage.checksum(file)[1]]

    def tasks(split: str) -> Iterator[dict]:
        common = search[split] | {"images": images if split == "train" else None}
        for group in groups[split]:
            found = {name: near[name] for name in group.names if name in near} if near and split == "train" else {}
            yield common | {"number": group.number, "first": group.first, "count": group.count, "near": found}

    small = [split for split, own in search.items() if own["groups"] == own["buckets"] == 1]
    list(run_tasks(decide, chain.from_iterable(map(tasks, small)), "Deduplicate"))
    for split in search.keys() - {*small}:
        for step in steps:
            for _ in run_tasks(spread, (task | {"step": step} for task in tasks(split)), "SpreadDigests"):
                pass
            buckets = ({"step": step, "bucket": bucket} for bucket in range(search[split]["buckets"]))
            for _ in run_tasks(find_later, (search[split] | bucket for bucket in buckets), "FindDuplicates"):
                pass
    return search


def decide(task: dict) -> dict:
    """All steps for a split of one group and one bucket. Runs inside a Ray task."""
    for step in task["steps"]:
        spread(task | {"step": step})
        find_later(task | {"step": step, "bucket": 0})
    return {}


def spread(task: dict) -> dict:
    """Write the digests of the records of a group that are still used, by bucket. Runs inside a Ray task."""
    step, buckets = task["step"], task["buckets"]
    first_step = step == task["steps"][0]
    before = {} if first_step else _by_partition(removed(task, task["steps"][: task["steps"].index(step)]))
    excluded = _excluded(*task["images"]) if task["images"] else None
    images: list[tuple[int, int, str, str]] = []
    parts: list[list[pa.RecordBatch]] = [[] for _ in range(buckets)]
    columns = ["reason", step, "record_id", "source", *(["digests"] if excluded and first_step else [])]
    names = Group(task["split"], task["number"], task["first"], task["count"]).names
    for owner, (name, outcomes) in enumerate(iter_outcomes(names, task["work"], columns), task["first"]):
        usable = outcomes["reason"].is_null().to_numpy().copy()
        if first_step:
            found = _with_images(outcomes, excluded, task["near"].get(name, []), usable)
            images += [(owner, row, *why) for row, why in sorted(found.items())]
            usable[list(found)] = False
        usable[before.get(owner, [])] = False
        rows = np.flatnonzero(usable).astype(np.int32)
        columns_of = {name: outcomes[name].combine_chunks().take(pa.array(rows)) for name in ("record_id", "source")}
        keys = outcomes[step].combine_chunks().take(pa.array(rows))
        owners = pa.array(np.full(len(rows), owner, dtype=np.int32))
        batch = pa.record_batch([keys, owners, pa.array(rows), *columns_of.values()], schema=_KEYS)
        where = _numbers(keys)[:, 0] % buckets if buckets > 1 else np.zeros(len(rows), dtype=np.uint64)
        for bucket, part in enumerate(parts):
            part.append(batch if buckets == 1 else batch.filter(pa.array(where == bucket)))
    _write(_keys_file(task, step, task["number"]), _KEYS, parts)
    if first_step:
        rows = [dict(zip(REMOVED.names, image, strict=True)) for image in images]
        storage.write_table(_images_file(task, task["number"]), pa.Table.from_pylist(rows, REMOVED))
    return {}


def find_later(task: dict) -> dict:
    """Find the records of a bucket whose digest came before, and write them by group. Runs inside a Ray task."""
    _, reason, what = next(step for step in _STEPS if step[0] == task["step"])
    readers = [storage.open_arrow(_keys_file(task, task["step"], group)) for group in range(task["groups"])]
    batches = [reader.get_batch(task["bucket"]) for reader in readers]
    table = pa.Table.from_batches(batches, _KEYS).combine_chunks()
    first = first_of_each(_numbers(table["key"].combine_chunks()))
    later = np.flatnonzero(first != np.arange(len(first)))
    causes = table.take(pa.array(first[later]))
    detail = pc.binary_join_element_wise(what, causes["record_id"], "of", causes["source"], " ")
    found = table.take(pa.array(later))
    columns = [found["owner"], found["row"], pa.array([reason] * len(later), pa.string()), detail]
    found = pa.Table.from_arrays(columns, schema=REMOVED).combine_chunks()
    ends = np.searchsorted(later, np.cumsum([0, *map(len, batches)]))
    parts = [found.slice(start, end - start).to_batches() for start, end in pairwise(ends.tolist())]
    _write(_later_file(task, task["step"], task["bucket"]), REMOVED, parts)
    return {}


def removed(task: dict, steps: list[str]) -> pa.Table:
    """The records of a group that are not used, after some of the steps.

    Args:
        task: what `find_removals` gave of its split, with the group's `number`.
        steps: "id", "content".
    """
    tables = [storage.open_arrow(_images_file(task, task["number"])).read_all()]
    for step in steps:
        for bucket in range(task["buckets"]):
            batch = storage.open_arrow(_later_file(task, step, bucket)).get_batch(task["number"])
            tables.append(pa.Table.from_batches([batch], REMOVED))
    return pa.concat_tables(tables)


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """For each row of an array (n, 2), the index of the first row that is equal: its own where it is the first."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal rows stay in their order
    ranked = keys[order]
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    group = np.maximum.accumulate(np.where(starts, np.arange(len(keys)), 0))
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = order[group]
    return first


def _with_images(outcomes: pa.Table, excluded: Excluded | None, near: list, usable: np.ndarray) -> dict:
    """Rows of a partition that show an image of an evaluation set, with reason and detail."""
    found = {}
    if excluded:
        images = outcomes["digests"].combine_chunks()
        lengths = images.value_lengths().fill_null(0).to_numpy()
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        before = np.cumsum(lengths) - lengths
        for place, name in excluded.find(images.flatten()):
            row = int(row_of[place])
            if usable[row] and row not in found:
                found[row] = CONTAMINATED, f"image {place - int(before[row]) + 1} is one of {name}"
    for row, text in near:
        if usable[row]:
            found.setdefault(row, (NEAR, text))
    return found


def _by_partition(table: pa.Table) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for owner, row in zip(table["owner"].to_pylist(), table["row"].to_pylist(), strict=True):
        rows.setdefault(owner, []).append(row)
    return rows


def _write(uri: str, schema: pa.Schema, parts: list[list[pa.RecordBatch]]) -> None:
    """One record batch for each part, however many it is of."""
    with storage.atomic_file(uri) as path, pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for part in parts:
            whole = pa.Table.from_batches(part, schema).combine_chunks().to_batches()
            writer.write_batch(whole[0] if whole else pa.RecordBatch.from_pylist([], schema))


def _numbers(keys: pa.Array) -> np.ndarray:
    """Digests as two unsigned numbers each, (n, 2)."""
    data = np.frombuffer(keys.buffers()[1] or b"", dtype=np.uint8)[keys.offset * DIGEST_BYTES :]
    return data[: len(keys) * DIGEST_BYTES].view("<u8").reshape(-1, 2)


@lru_cache(maxsize=1)
def _excluded(uri: str, version: str) -> Excluded:
    return Excluded.load(uri)


def _keys_file(task: dict, step: str, group: int) -> str:
    return storage.join(task["work"], "keys", f"{step}-{task['split']}-{group:05d}.arrow")


def _images_file(task: dict, group: int) -> str:
    return storage.join(task["work"], "removed", f"images-{task['split']}-{group:05d}.arrow")


def _later_file(task: dict, step: str, bucket: int) -> str:
    return storage.join(task["work"], "removed", f"{step}-{task['split']}-{bucket:05d}.arrow")
