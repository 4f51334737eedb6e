"""The whole training stack against a bare torch loop: seconds of a step, same model, data, threads and machine.

    python -m tests.benchmarks.train_overhead --rounds 5

Ours: Ray Train, one worker, DeepSpeed ZeRO-2, events to the driver, a checkpoint every 20 steps. The loop: AdamW with
the same groups, schedule and clipping, the same reader, nothing else. They run in turns, each in a process of its own.
What is compared is the median window of 20 steps, so every window of ours has a checkpoint in it; the first window is
left out, it warms up. Wanted: ours at most 1.10 of the loop.

Each computes in one thread, which leaves the second core of a laptop to Ray's own processes, as a training node has
cores to spare; `--threads 2` leaves none. The ratio also depends on the tokens of a micro batch, as part of the cost
is by parameter: docs/explanation/measurements.md has both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

WANTED = 1.10
WINDOW = 20
# The quickstart's model; a micro batch of 1,024 tokens, where the quickstart takes 1,536.
SIZES = {
    "model": {
        "text": {"hidden_size": 128, "num_hidden_layers": 3, "state_size": 64, "head_dim": 64, "chunk_size": 32},
        "connector": {"hidden_size": 256, "head_dim": 16, "state_size": 64, "chunk_size": 32},
    }
}


def bare(job: dict) -> list[float]:
    """The loop. Returns the seconds of a step in each window."""
    import torch

    from mlmamba.modeling import MLMambaForConditionalGeneration
    from pipelines.reader import PackedDataset, prefetch, step_indices
    from workflows.configs.train import StageRecipe
    from workflows.train.stage import freeze, parameter_groups, schedule
    from workflows.train.step import batch_maker, to_device

    torch.set_num_threads(job["threads"])
    stage = StageRecipe(**job["stage"])
    model = MLMambaForConditionalGeneration.from_pretrained(job["start_from"], dtype=torch.float32)
    freeze(model, stage)
    model.train()  # after freezing: a frozen encoder stays in evaluation mode
    optimizer = torch.optim.AdamW(parameter_groups(model, stage), betas=(0.9, 0.98), eps=1e-8)
    scheduler = schedule(stage, optimizer, stage.steps)
    dataset = PackedDataset(job["data"])
    size = model.config.vision_config.image_size
    make = batch_maker(dataset, stage.micro_batch_rows, model.config.text_config.pad_token_id, size)
    stream = prefetch(make, step_indices(dataset, job["seed"], stage.batch_rows, 0, 1), job["threads"])
    windows, start = [], time.perf_counter()
    for step, micro_batches in zip(range(1, stage.steps + 1), stream, strict=False):
        for batch in micro_batches:
            inputs, _ = to_device(batch, model.device)
            loss = model(**inputs, logits_to_keep=1, use_cache=False).loss / len(micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % WINDOW == 0:
            windows.append((time.perf_counter() - start) / WINDOW)
            start = time.perf_counter()
    return windows


def main() -> None:
    """Run both in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5 * WINDOW)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        print(json.dumps(bare(json.loads(arguments.bare))))
        return
    import ray

    from tests.integration.toy_stage import run_toy_stage, toy_recipe
    from tests.integration.toy_training import make_toy

    stage = {"steps": arguments.steps, "batch_rows": 8, "micro_batch_rows": 4}
    train = {"workers": 1, "cpus_per_worker": arguments.threads, "zero_stage": 2}
    train |= {"log_every": WINDOW, "save_every": WINDOW}
    ours, loop, waits = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        ray.init("local", num_cpus=arguments.threads, include_dashboard=False, log_to_driver=False)
        toy = make_toy(Path(folder) / "toy", **SIZES)
        recipe = toy_recipe(toy, stage, **train)
        job = toy.job(Path(folder) / "bare", stage, **train) | {"threads": arguments.threads}
        command = [sys.executable, "-m", "tests.benchmarks.train_overhead", "--bare", json.dumps(job)]
        for turn in range(arguments.rounds):
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            loop.append(json.loads(said.stdout.splitlines()[-1])[1:])
            start = time.perf_counter()
            outcome = run_toy_stage(toy, Path(folder) / f"ours-{turn}", recipe)
            windows = [event["seconds_per_step"] for event in outcome.of("metrics")]
            waits.append(time.perf_counter() - start - sum(windows) * WINDOW)
            ours.append(windows[1:])
        ray.shutdown()
    print(f"{'round':>5}{'bare loop':>14}{'whole stack':>14}{'ratio':>8}    seconds of a step, median window")
    for number, (bare_windows, our_windows) in enumerate(zip(loop, ours, strict=True)):
        a, b = statistics.median(bare_windows), statistics.median(our_windows)
        print(f"{number:5}{a:14.4f}{b:14.4f}{b / a:8.3f}")
    ratio = statistics.median(chain(*ours)) / statistics.median(chain(*loop))
    print(f"all windows {ratio:.3f}, wanted at most {WANTED:.2f}; start and end of a stage took {min(waits):.1f} s")
    sys.exit(ratio > WANTED)


if __name__ == "__main__":
    main()
