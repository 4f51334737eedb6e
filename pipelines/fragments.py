"""Cutting the sources of all splits into fragments, on Ray, and from them the partitions of each split.

A task cuts a unit of a source (a file) and leaves its fragments in a file, so that the driver holds the names of those
files and no more, whatever the size of the corpus. Where a limit, a weight that is not whole or the numbering of
repeated ids asks for it, other tasks count the records of fragments whose number is not known, and name them.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice

import numpy as np
import pyarrow as pa
import ray

from pipelines import storage
from pipelines.execution import run_tasks
from pipelines.held_out import side_digest
from pipelines.records import Partition, digest_of
from pipelines.schema import DIGEST_BYTES, digest
from pipelines.source_config import SourceConfig
from pipelines.sources import Fragment, open_source
from pipelines.sources.open import Choice, share_rows
from pipelines.tokenize import worker_source

_LISTED = 8  # fragments that a task lists
_UNITS_AT_ONCE = 4  # a CPU, where a limit may make the rest unnecessary
_NUMBERS = pa.schema([("row", pa.int32()), ("times", pa.int32())])


@dataclass
class SourceCut:
    """The fragments of a source."""

    config: SourceConfig
    place: str
    """Where its files are."""
    files: list[tuple[str, int]] = field(default_factory=list)
    """Names of the files with the fragments, and how many are in each."""
    records: int | None = 0
    """How many records it has, up to its limit; None where that is not known."""
    numbers: tuple[str, str] | None = None
    """File with the numbers of repeated ids, and its digest."""

    def fragments(self) -> Iterator[Fragment]:
        """All, in order."""
        for file, count in self.files:
            if count:
                for line in storage.read_bytes(file).splitlines():
                    yield Fragment(**json.loads(line))

    def partitions(self) -> Iterator[tuple[int, Fragment, Choice, int | None]]:
        """Number of the fragment, fragment, choice and number of records of each partition, in order."""
        whole = int(self.config.weight)
        for repeat in range(1, math.ceil(self.config.weight) + 1):
            offset = 0
            for number, fragment in enumerate(self.fragments()):
                if self.records is not None and offset >= self.records:
                    break
                choice, count = Choice(repeat), fragment.records
                if count is not None and self.records is not None and offset + count > self.records:
                    count = self.records - offset
                    choice = replace(choice, take=count)
                if repeat > whole:
                    key = self.config.label, self.config.seed
                    rows = share_rows(offset, offset + count, self.records, self.config.weight - whole, *key)
                    if len(rows) < count:
                        choice = replace(choice, rows=tuple(row - offset for row in rows))
                    offset, count = offset + count, len(rows)
                    if not rows:
                        continue
                elif count is not None:
                    offset += count
                if count != 0:
                    yield number, fragment, choice, count


def cut_sources(sources: dict[str, SourceConfig], size: int, work: str) -> dict[str, SourceCut]:
    """Cut sources into fragments.

    Args:
        sources: by a name for each, of letters that a file's name may have.
        size: records of a fragment, about.
        work: folder (path or URI) for the files.

    Raises:
        FileNotFoundError, ValueError: a source cannot be read.
    """
    cuts, tasks = {}, []
    for name, config in sources.items():
        cut = cuts[name] = SourceCut(config, storage.join(work, "fragments", name))
        absolute = config.absolute().model_dump_json()
        for number, unit in enumerate(open_source(config).units()):
            file = storage.join(cut.place, f"{number:05d}.jsonl")
            cut.files.append((file, 0))
            tasks.append({"name": name, "number": number, "source": absolute, "unit": unit, "size": size, "file": file})
    for result in run_tasks(cut_unit, tasks):
        cut = cuts[result["name"]]
        cut.files[result["number"]] = cut.files[result["number"]][0], result["fragments"]
        known = cut.records is not None and result["records"] is not None
        cut.records = cut.records + result["records"] if known else None
    for cut in cuts.values():
        _count(cut)
    return cuts


def partitions(split: str, cuts: list[SourceCut], settings: str) -> Iterator[Partition]:
    """The partitions of a split, in order.

    Args:
        split: name of the split.
        cuts: of its sources, in order.
        settings: digest of all else that decides what tokenizing gives.
    """
    index = 0
    for cut in cuts:
        file, of_numbers = cut.numbers or ("", "")
        for number, fragment, choice, count in cut.partitions():
            own = digest_of(settings, cut.config, fragment, choice, of_numbers)
            if cut.config.validation:
                if split == "validation" and choice.repeat > 1:
                    continue
                own = side_digest(own, split, cut.config.validation)
                count = None if count is None else count * (split == "train")  # each record counts once, on that side
            numbers = (file, number) if cut.numbers else None
            yield Partition(split, index, count, own, cut.config.label, fragment, choice, numbers)
            index += 1


def cut_unit(task: dict) -> dict:
    """Cut a unit of a source and write its fragments. Runs inside a Ray task."""
    lines, records = [], 0
    for fragment in worker_source(task["source"]).cut(task["unit"], task["size"]):
        lines.append(json.dumps(asdict(fragment)))
        known = records is not None and fragment.records is not None
        records = records + fragment.records if known else None
    storage.write_atomic(task["file"], "\n".join(lines))
    return {"name": task["name"], "number": task["number"], "fragments": len(lines), "records": records}


def _count(cut: SourceCut) -> None:
    """Count the records of a source where its config asks for it, and number its repeated ids."""
    config = cut.config
    names = config.repeated_ids == "number"
    if not names and config.limit is None and config.weight == int(config.weight):
        return
    if cut.records is None or names:
        _list_fragments(cut, names)
    cut.records = min(cut.records, config.limit or cut.records)
    if names and cut.files:
        (result,) = run_tasks(number_ids, [{"place": cut.place, "files": len(cut.files), "records": cut.records}])
        cut.numbers = result["file"], result["digest"]


def _list_fragments(cut: SourceCut, names: bool) -> None:
    """List the fragments of a source for their numbers of records, until its limit is reached."""
    source = cut.config.absolute().model_dump_json()
    at_once = _UNITS_AT_ONCE * int(ray.cluster_resources().get("CPU", 1))
    files, cut.records, cut.files = iter(cut.files), 0, []
    while some := list(islice(files, at_once if cut.config.limit else None)):
        parts = [(file, start) for file, count in some for start in range(0, count, _LISTED)]
        tasks = [
            {"source": source, "file": file, "start": start, "number": len(cut.files) + i}
            | {"place": cut.place, "names": names}
            for i, (file, start) in enumerate(parts)
        ]
        found = {result["number"]: result for result in run_tasks(list_fragments, tasks)}
        cut.files += [(found[task["number"]]["file"], found[task["number"]]["fragments"]) for task in tasks]
        cut.records += sum(result["records"] for result in found.values())
        if cut.config.limit and cut.records >= cut.config.limit:
            break


def list_fragments(task: dict) -> dict:
    """Count the records of some fragments, and write their ids' digests if asked. Runs inside a Ray task."""
    source, counted, total = worker_source(task["source"]), [], 0
    schema = pa.schema([("id", pa.binary(DIGEST_BYTES))])
    ids = []
    for line in storage.read_bytes(task["file"]).splitlines()[task["start"] : task["start"] + _LISTED]:
        fragment = Fragment(**json.loads(line))
        found = [digest(record.id.encode()) if task["names"] else b"" for record in source.read(fragment)]
        counted.append(json.dumps(asdict(replace(fragment, records=len(found)))))
        total += len(found)
        if task["names"]:
            ids.append(pa.record_batch([pa.array(found, schema.field(0).type)], schema=schema))
    if task["names"]:
        file = storage.join(task["place"], f"ids-{task['number']:05d}.arrow")
        storage.write_table(file, pa.Table.from_batches(ids, schema))
    file = storage.join(task["place"], f"counted-{task['number']:05d}.jsonl")
    storage.write_atomic(file, "\n".join(counted))
    return {"number": task["number"], "file": file, "fragments": len(counted), "records": total}


def number_ids(task: dict) -> dict:
    """Write, for each fragment, which of its records have an id that came before, and how often by then.

    Runs inside a Ray task, one for a source; it takes some 60 bytes of memory a record.
    """
    counts, ids = [], []
    for number in range(task["files"]):
        counted = storage.read_bytes(storage.join(task["place"], f"counted-{number:05d}.jsonl")).splitlines()
        counts += [json.loads(line)["records"] for line in counted]
        column = storage.open_arrow(storage.join(task["place"], f"ids-{number:05d}.arrow")).read_all()["id"]
        ids += [np.frombuffer(chunk.buffers()[1], f"V{DIGEST_BYTES}")[: len(chunk)] for chunk in column.chunks]
    keys = np.concatenate(ids or [np.zeros(0, f"V{DIGEST_BYTES}")])[: task["records"]]
    pairs = keys.view("<u8").reshape(-1, 2)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    ranked = pairs[order]
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    places = np.arange(len(keys))
    times = np.empty(len(keys), dtype=np.int32)
    times[order] = places - np.maximum.accumulate(np.where(starts, places, 0)) + 1
    file, start = storage.join(task["place"], "numbers.arrow"), 0
    with storage.atomic_file(file) as path:
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, _NUMBERS) as writer:
            for count in counts:
                own = times[start : start + count]
                rows = np.flatnonzero(own > 1)
                columns = [pa.array(rows, pa.int32()), pa.array(own[rows], pa.int32())]
                writer.write_batch(pa.record_batch(columns, schema=_NUMBERS))
                start += count
        return {"file": file, "digest": storage.checksum(path)[1]}
