"""CPU time and memory that `prepare` takes of the driver, by the number of records.

    python -m tests.benchmarks.measurements.prepare_driver --records 1000000 5000000 20000000

The records are lines of JSON without images, a hundred bytes each. So that millions take minutes, what workers do with
a record is left out: tokenizing writes made-up lengths and digests, one in a hundred those of another record, and
packing writes nothing. All else is `prepare` as it is: cutting, duplicates, quarantine, plan, manifest. Each size runs
in a process of its own; its memory is the most that was resident, and what Python and its packages take is told apart.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import ray

from pipelines import pack, storage, tokenize
from pipelines.config import DataConfig, TokenizerConfig
from pipelines.execution import quiet_ray_data, run_tasks
from pipelines.plan import read_plan
from pipelines.prepare import prepare
from pipelines.records import Partition, outcomes_file
from pipelines.schema import DIGEST_BYTES, OUTCOMES
from pipelines.tokenizer import load_or_train, save
from tests.benchmarks.measurements.prepare_corpus import WORDS

_ALIKE = 100  # one record in so many has the content of another
_CPUS = 2


def main() -> None:
    """Run every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1_000_000, 5_000_000])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measure(arguments.one, arguments.records[0])))
        return
    print(f"{'records':>12}{'driver CPU':>12}{'a record':>11}{'peak memory':>13}{'before':>9}{'wall':>8}", flush=True)
    for records in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.benchmarks.measurements.prepare_driver", "--one", folder]
            done = subprocess.run([*command, "--records", str(records)], check=True, stdout=subprocess.PIPE)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{records:12,}{found['cpu']:10.1f} s{1e6 * found['cpu'] / records:8.2f} us{found['peak'] / 1024:9.0f} MiB"
            f"{found['before'] / 1024:5.0f} MiB{found['wall']:6.0f} s   CPU by phase: {found['phases']}",
            flush=True,
        )


def _measure(folder: Path, records: int) -> dict:
    with open(folder / "a.jsonl", "w") as file:
        for i in range(records):
            file.write(
                f'{{"id":"{i}","conversations":[{{"from":"human","value":"q"}},{{"from":"gpt","value":"a {i}"}}]}}\n'
            )
    save(load_or_train(TokenizerConfig(train_vocab_size=300), [" ".join(WORDS)]), str(folder / "tokenizer"))
    config = DataConfig(
        train=[{"type": "llava", "annotations": str(folder / "a.jsonl")}],
        tokenizer={"name": str(folder / "tokenizer")},
        max_tokens=4096,
    )
    tokenize.tokenize_partition, pack.pack_shard = write_outcomes, count_shard
    ray.init("local", num_cpus=_CPUS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with quiet_ray_data():
        list(run_tasks(_warm, [{}] * 4))
    before, process, phases = _peak(), psutil.Process(), {}
    start, began, last = sum(process.cpu_times()[:2]), time.perf_counter(), [sum(process.cpu_times()[:2]), "start"]

    def watch(progress) -> None:
        now = sum(process.cpu_times()[:2])
        phases[last[1]] = round(phases.get(last[1], 0) + now - last[0], 2)
        last[:] = now, progress.phase

    prepare(config, str(folder / "out"), 16, 0, watch)
    cpu, wall = sum(process.cpu_times()[:2]) - start, time.perf_counter() - began
    ray.shutdown()
    return {"cpu": cpu, "wall": wall, "before": before, "peak": _peak(), "phases": phases}


def write_outcomes(task: dict) -> dict:
    """In place of `tokenize_partition`: outcomes of made-up samples."""
    partition = Partition.from_json(task["partition"])
    count, rng = partition.records, np.random.default_rng(partition.index)
    ids, contents = (np.frombuffer(rng.bytes(DIGEST_BYTES * count), f"V{DIGEST_BYTES}").copy() for _ in range(2))
    contents[::_ALIKE] = np.frombuffer((partition.index % 7).to_bytes(DIGEST_BYTES, "little"), f"V{DIGEST_BYTES}")
    lengths = np.clip(rng.lognormal(5.3, 0.7, count), 16, 4096).astype(np.int32)
    zeros = np.zeros(count, dtype=np.int32)
    columns = {
        "record_id": pa.array([str(partition.fragment.first + i) for i in range(count)]),
        "source": pa.array(["llava"] * count),
        "length": lengths,
        "images": zeros,
        "cut_turns": zeros,
        "reason": pa.nulls(count, pa.string()),
        "detail": pa.nulls(count, pa.string()),
        "id": pa.FixedSizeBinaryArray.from_buffers(pa.binary(DIGEST_BYTES), count, [None, pa.py_buffer(ids)]),
        "content": pa.FixedSizeBinaryArray.from_buffers(pa.binary(DIGEST_BYTES), count, [None, pa.py_buffer(contents)]),
        "digests": pa.array([[]] * count, OUTCOMES.field("digests").type),
    }
    schema = OUTCOMES.with_metadata({"mlmamba.digest": partition.digest})
    storage.write_table(outcomes_file(task["work"], partition.name), pa.table(columns, schema=schema))
    own = {"name": partition.name, "split": partition.split, "source": partition.source, "records": count}
    return own | {"cut": 0, "quarantined": {}, "losses": [], "skipped": False}


def count_shard(task: dict) -> dict:
    """In place of `pack_shard`: the facts of a shard that is not written."""
    rows = read_plan(task["plan"], task["batch"])
    samples = sum(map(len, rows))
    facts = dict.fromkeys(("tokens", "loss_tokens", "bytes"), samples) | {"images": 0, "sha256": "0" * 64}
    shard = facts | {
        "path": task["path"],
        "rows": len(rows),
        "samples": samples,
        "samples_by_source": {"llava": samples},
    }
    return {"split": task["split"], "shard": shard, "skipped": False}


def _warm(task: dict) -> dict:
    import pipelines.pack  # noqa: F401  (loads into the worker what tasks need)

    time.sleep(0.2)
    return task


def _peak() -> int:
    """Most resident memory so far, KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
