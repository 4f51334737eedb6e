"""Which training images look like one of an evaluation set, compared on Ray, a partition a task."""

from functools import lru_cache

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.execution import run_tasks
from pipelines.looks import Wanted
from pipelines.progress import ProgressMeter
from pipelines.records import Partition

_KEYS = "looks.arrow"


def find_alike(
    partitions: list[Partition], work: str, keys: list[bytes], least: float, on_progress
) -> dict[str, list[tuple[int, int, int, float]]]:
    """For each partition's name: row, number of the image in its record, place in `keys`, how much alike.

    Args:
        partitions: of the train split, tokenized with `looks`.
        work: folder of their files.
        keys: of the evaluation sets' images (looks.py).
        least: how much alike counts.
        on_progress: as for `prepare`.
    """
    wanted = storage.join(work, _KEYS)
    storage.write_table(wanted, pa.table({"looks": pa.array(keys, pa.binary())}))
    version = storage.checksum(wanted)[1]  # a worker of an earlier run may hold another file's
    tasks = [
        {
            "name": p.name,
            "size": p.records,
            "outcomes": p.outcomes_file(work),
            "wanted": [wanted, version],
            "least": least,
        }
        for p in partitions
    ]
    meter = ProgressMeter("compare", "records", on_progress, sum(task["size"] for task in tasks))
    found = {}
    for result in run_tasks(compare_partition, tasks):
        found[result["name"]] = result["found"]
        meter.add(result["size"])
    return found


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
    return {"name": task["name"], "size": task["size"], "found": found}


@lru_cache(maxsize=1)
def _wanted(uri: str, version: str) -> Wanted:
    return Wanted(storage.open_arrow(uri).read_all()["looks"].to_pylist())
