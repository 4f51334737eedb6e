"""Which training images look like one of an evaluation set, compared on Ray, a partition a task."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.dedup import Near
from pipelines.exclusion import Excluded
from pipelines.execution import run_tasks
from pipelines.looks import Wanted
from pipelines.progress import ProgressMeter
from pipelines.records import outcomes_file

_KEYS = "looks.arrow"


def find_alike(names: Iterable[str], total: int, work: str, excluded: Excluded, least: float, on_progress) -> Near:
    """The records with an image that looks like one of an evaluation set, and what is said of them.

    Args:
        names: of the partitions of the train split, tokenized with `looks`.
        total: their records.
        work: folder of their files.
        excluded: the evaluation sets' images, with their keys (looks.py).
        least: how much alike counts.
        on_progress: as for `prepare`.
    """
    wanted = storage.join(work, _KEYS)
    storage.write_table(wanted, pa.table({"looks": pa.array(excluded.keys, pa.binary())}))
    version = storage.checksum(wanted)[1]  # a worker of an earlier run may hold another file's
    common = {"wanted": [wanted, version], "least": least}
    tasks = ({"name": name, "outcomes": outcomes_file(work, name)} | common for name in names)
    meter = ProgressMeter("compare", "records", on_progress, total)
    near: Near = {}
    for result in run_tasks(compare_partition, tasks, "Compare"):
        meter.add(result["size"])
        said = near[result["name"]] = []
        for row, number, twin, much in result["found"]:  # the first image of a record is told
            image, own = excluded.twin(twin)
            said.append((row, f"image {number} looks like the image of {image} ({much:.2f}) of {own}"))
    return near


def compare_partition(task: dict) -> dict:
    """Compare the images of a partition. Runs inside a Ray task."""
    column = storage.open_arrow(task["outcomes"], ["looks"]).read_all()["looks"].combine_chunks()
    lengths = column.value_lengths().fill_null(0).to_numpy()
    row_of, before = np.repeat(np.arange(len(lengths)), lengths), np.cumsum(lengths) - lengths
    alike = _wanted(*task["wanted"]).find(column.flatten().to_pylist(), task["least"])
    found = [
        [int(row_of[place]), place - int(before[row_of[place]]) + 1, twin, round(much, 3)]
        for place, twin, much in alike
    ]
    return {"name": task["name"], "size": len(lengths), "found": found}


@lru_cache(maxsize=1)
def _wanted(uri: str, version: str) -> Wanted:
    return Wanted(storage.open_arrow(uri).read_all()["looks"].to_pylist())
