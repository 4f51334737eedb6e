"""Peak memory of `prepare` at two corpus sizes: it must not grow with the corpus.

    python -m tests.benchmarks.measurements.prepare_memory --records 50000 200000

Each size runs in a fresh process with a fresh Ray on `--cpus`. Five times a second the proportional set size (PSS) of
the driver and of every Ray worker below it is read from /proc/PID/smaps_rollup and added up. PSS is resident memory in
which a page that n processes share counts 1/n in each, so the sum counts it once. It includes the object store's pages,
which are shared memory, so far as these processes have touched them, and mapped files; both are also given by
themselves. The raylet and the GCS server, which know nothing of the corpus, are left out.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.benchmarks.measurements.prepare_corpus import data_config, write_corpus

TARGET = 0.15
_FIELDS = ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem")
_RUN = """
import logging, sys
import ray
from pipelines.config import DataConfig
from pipelines.prepare import prepare

ray.init(num_cpus=int(sys.argv[3]), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
manifest = prepare(DataConfig.model_validate_json(sys.argv[1]), sys.argv[2], 16, 0)
print(manifest.splits["train"].samples, flush=True)
"""


def main() -> None:
    """Run every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--cpus", type=int, default=2)
    arguments = parser.parse_args()
    peaks = []
    head = f"{'records':>9}{'seconds':>9}{'peak MiB':>10}{'driver':>8}{'workers':>9}"
    print(f"{head}   at the peak: anonymous, files, shared")
    for records in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder), records, 500, (48, 64))
            seconds, peak = _measure(folder, arguments.cpus, records)
        peaks.append(peak["Pss"])
        parts = ", ".join(f"{peak[field] / 1024:,.0f}" for field in _FIELDS[1:])
        total, driver = peak["Pss"] / 1024, peak["driver"] / 1024
        sizes = f"{total:10,.0f}{driver:8,.0f}{total - driver:9,.0f}"
        print(f"{records:9,}{seconds:9.0f}{sizes}   {parts}", flush=True)
    print(f"last against first: {peaks[-1] / peaks[0] - 1:+.1%}, target below {TARGET:+.0%}")


def _measure(folder: str, cpus: int, records: int) -> tuple[float, Counter]:
    """Seconds of one run and its peak: sums in KiB by field, and `driver` for that process alone."""
    from pipelines.config import DataConfig

    settings = data_config(Path(folder), max_tokens=1024, partition_records=1000, shard_rows=256)
    command = [sys.executable, "-c", _RUN, DataConfig(**settings).model_dump_json(), f"{folder}/out", str(cpus)]
    start, peak = time.monotonic(), Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            now = _sum(process.pid)
            peak = max(peak, now, key=lambda memory: memory["Pss"])
            time.sleep(0.2)
        assert process.stdout.read().split() == [str(records)]
    return time.monotonic() - start, peak


def _sum(driver: int) -> Counter:
    """Memory of a driver and its Ray workers now, in KiB by field."""
    total = Counter()
    try:
        processes = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for process in processes:
        try:
            if process.pid != driver and not process.cmdline()[:1][0].startswith("ray::"):
                continue
            memory = _read(process.pid)
        except (psutil.NoSuchProcess, OSError, IndexError):  # it has just ended
            continue
        total.update(memory)
        if process.pid == driver:
            total["driver"] = memory["Pss"]
    return total


def _read(pid: int) -> Counter:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        lines = dict(line.split(":", 1) for line in file if ":" in line and line.split(":", 1)[0] in _FIELDS)
    return Counter({field: int(lines[field].split()[0]) for field in _FIELDS})


if __name__ == "__main__":
    main()
