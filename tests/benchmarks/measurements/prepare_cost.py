"""CPU seconds and memory of `prepare` by the size of its images: what workflows/plan/data.py reckons with.

    python -m tests.benchmarks.measurements.prepare_cost --records 6000

Corpora that differ in the bytes of their images are prepared on two CPUs, and the multiprocessing loop of
prepare_throughput does the same work by hand. CPU time is counted, not the clock's, so that other work on the machine
matters little; and of two lengths of a corpus the difference, so that starting does not count. It falls into what the
worker processes do, which more nodes share, and what the driver does alone. The workers' part is fitted by a constant
per record and one per byte of image. The last columns are the peak resident memory of a worker that has loaded its
packages, and what the largest worker had more than that, over the bytes of a shard.
"""

import argparse
import json
import logging
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from pipelines.config import DataConfig, TokenizerConfig
from pipelines.execution import quiet_ray_data, run_tasks
from pipelines.prepare import prepare
from pipelines.tokenizer import load_or_train, save
from tests.benchmarks.measurements.prepare_by_hand import MAX_TOKENS, TOKENS_PER_IMAGE
from tests.benchmarks.measurements.prepare_corpus import WORDS, data_config, write_corpus
from tests.benchmarks.measurements.prepare_throughput import _warm

SIDES = ((240, 480), (336, 640), (640, 1280))
"""Least and most pixels of an image's side, by corpus."""
_CPUS = 2
_UNITS = {"partition_records": 250, "shard_rows": 256}


@dataclass(frozen=True)
class Cost:
    """One preparation, per record."""

    image_bytes: float
    worker: float
    driver: float
    loop: float
    """CPU seconds of the loop by hand."""
    base: int
    """Bytes of a worker before its first task."""
    task: float
    """Bytes that the largest worker gained at its peak, over the bytes of a shard."""


def main() -> None:
    """Prepare every corpus and print a table and the fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=6000)
    parser.add_argument("--images", type=int, default=500)
    arguments = parser.parse_args()
    print(f"{arguments.records:,} records, {_CPUS} CPUs; CPU milliseconds per record, MiB")
    print(f"{'KiB an image':>14}{'workers':>9}{'driver':>8}{'loop':>8}{'of the loop':>13}{'worker':>8}{'task':>7}")
    costs = []
    for sides in SIDES:
        with tempfile.TemporaryDirectory() as folder:
            cost = _measure(Path(folder), arguments.records, arguments.images, sides)
        costs.append(cost)
        print(
            f"{cost.image_bytes / 1024:14.0f}{1e3 * cost.worker:9.2f}{1e3 * cost.driver:8.2f}{1e3 * cost.loop:8.2f}"
            f"{(cost.worker + cost.driver) / cost.loop:13.2f}{cost.base / 2**20:8.0f}{cost.task:7.1f}",
            flush=True,
        )
    first, *_, last = costs
    slope = (last.worker - first.worker) / (last.image_bytes - first.image_bytes)
    fixed = first.worker - slope * first.image_bytes
    print(f"workers: {1e3 * fixed:.2f} ms per record and {1e9 * slope:.1f} ms per MB of images")
    for cost in costs[1:-1]:
        print(f"between: {1e3 * (fixed + slope * cost.image_bytes):.2f} ms by this, {1e3 * cost.worker:.2f} measured")


def _measure(folder: Path, records: int, images: int, sides: tuple[int, int]) -> Cost:
    """The cost of the last three quarters of a corpus."""
    short, whole = (_spent(folder / str(count), count, images, sides) for count in (records // 4, records))
    more = records - records // 4
    differences = ((b - a) / more for a, b in zip(short[:3], whole[:3], strict=True))
    return Cost(size_of(folder / str(records)), *differences, *whole[3:])


def size_of(corpus: Path) -> float:
    """Mean bytes of a corpus' images."""
    sizes = [file.stat().st_size for file in (corpus / "images").iterdir()]
    return sum(sizes) / len(sizes)


def _spent(root: Path, records: int, images: int, sides: tuple[int, int]) -> tuple[float, float, float, int, float]:
    """CPU seconds of workers, driver and loop, bytes of a worker, and what it gained over the bytes of a shard."""
    write_corpus(root, records, images, sides)
    tokenizer = str(root / "tokenizer")
    save(load_or_train(TokenizerConfig(train_vocab_size=2000), [" ".join(WORDS)] * 50), tokenizer)
    loop = _by_hand(root, tokenizer)
    config = DataConfig(**data_config(root, tokenizer={"name": tokenizer}, max_tokens=MAX_TOKENS, **_UNITS))
    ray.init("local", num_cpus=_CPUS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with quiet_ray_data():
            list(run_tasks(_warm, [{}] * 4 * _CPUS))
        with Watch() as watch:
            driver = sum(psutil.Process().cpu_times()[:2])
            manifest = prepare(config, str(root / "ours"), TOKENS_PER_IMAGE, 0)
            driver = sum(psutil.Process().cpu_times()[:2]) - driver
    finally:
        ray.shutdown()
    largest = max(shard.bytes for shard in manifest.splits["train"].shards)
    shutil.rmtree(root / "ours")
    return watch.seconds, driver, loop, watch.base, (watch.peak - watch.base) / largest


def _by_hand(root: Path, tokenizer: str) -> float:
    """CPU seconds of the loop, its start-up included."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.measurements.prepare_by_hand",
        str(root),
        f"{tokenizer}/tokenizer.json",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, str(root / "peer"), str(_CPUS)], check=True, stdout=subprocess.PIPE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(root / "peer")
    assert json.loads(done.stdout)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Watch:
    """CPU time and peak memory of this process' Ray workers, looked at once a second."""

    def __enter__(self) -> "Watch":
        self._before = self._look()
        self.base = max(memory for _, memory in self._before.values())
        self._now = dict(self._before)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._thread.join()
        self._now |= self._look()
        self.seconds = sum(used - self._before.get(pid, (0.0, 0))[0] for pid, (used, _) in self._now.items())
        self.peak = max(memory for _, memory in self._now.values())

    def _keep_looking(self) -> None:
        while not self._ended.wait(1.0):
            self._now |= self._look()  # a worker that ends keeps what was seen last

    @staticmethod
    def _look() -> dict[int, tuple[float, int]]:
        """CPU seconds and peak resident bytes by process id."""
        found = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess, OSError, IndexError):
                if process.cmdline()[0].startswith("ray::") and "Agent" not in process.cmdline()[0]:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    found[process.pid] = (
                        sum(process.cpu_times()[:2]),
                        1024 * int(status.split("VmHWM:")[1].split()[0]),
                    )
        return found


if __name__ == "__main__":
    main()
