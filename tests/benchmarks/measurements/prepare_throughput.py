"""Records per second of `prepare` against a plain multiprocessing loop that does the same work by hand.

    python -m tests.benchmarks.measurements.prepare_throughput --records 20000

Both run on `--cpus` processes over one corpus with one tokenizer, in turns, and the median of `--repeat` counts. The
loop (prepare_by_hand.py) makes the same checks, decodes, tokenizes, packs and writes. It has no resume, no quarantine
table, no checksums and no order that is independent of the number of processes, and it writes every image once where
`prepare` writes it twice. To start Ray and one worker process per CPU, with what they import, is timed by itself: the
rate is given without and with it, for both. The last line is the loop with the pipeline's own check of images.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray

from pipelines.config import DataConfig, TokenizerConfig
from pipelines.execution import quiet_ray_data, run_tasks
from pipelines.prepare import prepare
from pipelines.tokenizer import load_or_train, save
from tests.benchmarks.measurements.prepare_by_hand import MAX_TOKENS, TOKENS_PER_IMAGE
from tests.benchmarks.measurements.prepare_corpus import WORDS, data_config, write_corpus

_UNITS = {"partition_records": 1000, "shard_rows": 256}  # the defaults of a recipe


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    ours, loop, same, loop_startup = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        root = write_corpus(Path(folder), arguments.records, arguments.images)
        tokenizer = str(root / "tokenizer")
        save(load_or_train(TokenizerConfig(train_vocab_size=2000), [" ".join(WORDS)] * 50), tokenizer)
        startup = _start_ray(arguments.cpus)
        for _ in range(arguments.repeat):
            result = _by_hand(root, tokenizer, root / "peer", arguments.cpus)
            loop.append(result["work"])
            loop_startup.append(result["startup"])
            same.append(_by_hand(root, tokenizer, root / "peer", arguments.cpus, "--prepares-check")["work"])
            ours.append(_with_prepare(root, tokenizer, str(root / "ours")))
        ray.shutdown()
    print(f"{arguments.records:,} records, {arguments.cpus} CPUs, median of {arguments.repeat}")
    print(f"{'':34}{'seconds':>9}{'records/s':>11}{'of the loop':>13}")
    peer, own, peer_startup = (statistics.median(values) for values in (loop, ours, loop_startup))
    for name, seconds, base in (
        ("multiprocessing loop", peer, peer),
        ("prepare", own, peer),
        ("multiprocessing loop with start-up", peer + peer_startup, peer + peer_startup),
        ("prepare with Ray's start-up", own + startup, peer + peer_startup),
        ("loop with prepare's image check", statistics.median(same), peer),
    ):
        print(f"{name:34}{seconds:9.1f}{arguments.records / seconds:11,.0f}{base / seconds:13.2f}")
    print(f"start-up: Ray {startup:.1f} s, loop {peer_startup:.1f} s")
    print(f"every run: loop {_list(loop)}; prepare {_list(ours)}; loop with prepare's check {_list(same)}")


def _with_prepare(root: Path, tokenizer: str, out: str) -> float:
    """The pipeline, on the Ray that is up. Returns the seconds."""
    config = DataConfig(**data_config(root, tokenizer={"name": tokenizer}, max_tokens=MAX_TOKENS, **_UNITS))
    start = time.perf_counter()
    manifest = prepare(config, out, TOKENS_PER_IMAGE, 0)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    assert manifest.splits["train"].samples == manifest.splits["train"].records
    return seconds


def _by_hand(root: Path, tokenizer: str, out: Path, cpus: int, *options: str) -> dict:
    """The loop, in a process of its own that never saw Ray. Returns its start-up and working seconds."""
    module = "tests.benchmarks.measurements.prepare_by_hand"
    command = [sys.executable, "-m", module, str(root), f"{tokenizer}/tokenizer.json", str(out), str(cpus), *options]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    shutil.rmtree(out)
    return result


def _start_ray(cpus: int) -> float:
    """Start Ray and let every CPU's worker process import what it needs. Returns the seconds it took."""
    start = time.perf_counter()
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="error")
    with quiet_ray_data():
        list(run_tasks(_warm, [{}] * 4 * cpus))
    return time.perf_counter() - start


def _warm(task: dict) -> dict:
    import pipelines.pack  # noqa: F401  (loads into the worker what tasks need)

    time.sleep(0.2)  # long enough that the tasks spread over the CPUs
    return task


def _list(seconds: list[float]) -> str:
    return " ".join(f"{value:.1f}" for value in seconds)


if __name__ == "__main__":
    main()
