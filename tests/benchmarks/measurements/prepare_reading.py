"""Images per second that training gets from a data set: a plain loop, background threads, background processes.

    python -m tests.benchmarks.measurements.prepare_reading

Rows of 4,096 tokens with LLaVA-like images are read from a memory map, decoded and resized to 384 pixels, batches of
four rows. The reader uses threads (pipelines/reader.py); the processes are there for comparison.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import ray

from mlmamba.image_layout import ImageLayout
from pipelines.config import DataConfig
from pipelines.prepare import prepare
from pipelines.reader import PackedDataset, collate, prefetch, step_indices
from tests.benchmarks.measurements.prepare_corpus import data_config, write_corpus

_ROWS, _SIZE = 4, 384


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = write_corpus(Path(folder), arguments.records, 400)
        out = str(root / "out")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        prepare(DataConfig(**data_config(root)), out, 729, 0)
        ray.shutdown()
        rates: dict[str, list[float]] = {}
        for _ in range(arguments.repeat):
            for name, stream in _streams(out):
                rates.setdefault(name, []).append(_rate(stream, arguments.steps))
    base = statistics.median(rates["plain loop"])
    for name, values in rates.items():
        print(f"{name:14}{statistics.median(values):8.0f} images/s{statistics.median(values) / base:7.2f} of the loop")


def _streams(out: str):
    dataset = PackedDataset(out)

    def make(rows: np.ndarray) -> dict:
        return collate(dataset.rows(rows), dataset.manifest.max_tokens, 0, ImageLayout(image_size=_SIZE))

    def indices():
        return step_indices(dataset, 0, _ROWS, 0, 1)

    yield "plain loop", map(make, indices())
    for threads in (1, 2, 4):
        stream = prefetch(make, indices(), threads)
        yield f"{threads} threads", stream
        stream.close()
    with ProcessPoolExecutor(2, initializer=_open, initargs=(out,)) as pool:
        yield "2 processes", _ahead(pool, indices())
        pool.shutdown(cancel_futures=True)


def _ahead(pool: ProcessPoolExecutor, items):
    """As `prefetch`, in processes."""
    pending = [pool.submit(_make, item) for item in itertools.islice(items, 4)]
    for item in items:
        yield pending.pop(0).result()
        pending.append(pool.submit(_make, item))


def _open(out: str) -> None:
    global _dataset
    _dataset = PackedDataset(out)


def _make(rows: np.ndarray) -> dict:
    batch = collate(_dataset.rows(rows), _dataset.manifest.max_tokens, 0, ImageLayout(image_size=_SIZE))
    return {name: value.numpy() for name, value in batch.items()}


def _rate(stream, steps: int) -> float:
    next(stream)  # starts what there is to start
    start = time.perf_counter()
    images = sum(len(batch["pixel_values"]) for batch in itertools.islice(stream, steps))
    return images / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
