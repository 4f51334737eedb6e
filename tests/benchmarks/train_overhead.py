"""The whole training stack against a bare torch loop: seconds of a step, same model, data, threads and machine.

    python -m tests.benchmarks.train_overhead --steps 60 --rounds 3

Ours: Ray Train, one worker, DeepSpeed ZeRO-2, events to the driver, a checkpoint every 20 steps. The loop: AdamW with
the same groups, schedule and clipping, the same reader, nothing else. They run in turns, each in a process of its own;
the first `--warm` steps are left out. Wanted: ours at most 1.10 of the loop.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WANTED = 1.10
SIZES = {
    "model": {
        "text": {"hidden_size": 128, "num_hidden_layers": 3, "state_size": 64, "head_dim": 64, "chunk_size": 32},
        "connector": {"hidden_size": 256, "head_dim": 16, "state_size": 64, "chunk_size": 32},
    }
}


def bare(job: dict, warm: int) -> float:
    """The loop. Returns the seconds of a step."""
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
    for step, micro_batches in zip(range(1, stage.steps + 1), stream, strict=False):
        if step == warm + 1:
            start = time.perf_counter()
        for batch in micro_batches:
            inputs, _ = to_device(batch, model.device)
            loss = model(**inputs, logits_to_keep=1, use_cache=False).loss / len(micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / (stage.steps - warm)


def main() -> None:
    """Run both in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        print(bare(json.loads(arguments.bare), arguments.warm))
        return
    import ray

    from tests.integration.toy_stage import run_toy_stage, toy_recipe
    from tests.integration.toy_training import make_toy

    stage = {"steps": arguments.steps, "batch_rows": 4, "micro_batch_rows": 2}
    train = {"workers": 1, "cpus_per_worker": arguments.threads, "zero_stage": 2, "log_every": 10, "save_every": 20}
    ours, loop, waits = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        ray.init("local", num_cpus=arguments.threads, include_dashboard=False, log_to_driver=False)
        toy = make_toy(Path(folder) / "toy", **SIZES)
        recipe = toy_recipe(toy, stage, **train)
        job = toy.job(Path(folder) / "bare", stage, **train) | {"threads": arguments.threads}
        for turn in range(arguments.rounds):
            command = [sys.executable, "-m", "tests.benchmarks.train_overhead", "--warm", str(arguments.warm)]
            said = subprocess.run([*command, "--bare", json.dumps(job)], check=True, stdout=subprocess.PIPE, text=True)
            loop.append(float(said.stdout.split()[-1]))
            start = time.perf_counter()
            outcome = run_toy_stage(toy, Path(folder) / f"ours-{turn}", recipe)
            steady = [e["seconds_per_step"] for e in outcome.of("metrics") if e["step"] > arguments.warm]
            ours.append(statistics.mean(steady))
            waits.append(time.perf_counter() - start - sum(e["seconds_per_step"] * 10 for e in outcome.of("metrics")))
        ray.shutdown()
    ratios = [a / b for a, b in zip(ours, loop, strict=True)]
    print(f"{'round':>5}{'bare loop':>14}{'whole stack':>14}{'ratio':>8}    seconds of a step")
    for number, row in enumerate(zip(loop, ours, ratios, strict=True)):
        print(f"{number:5}{row[0]:14.4f}{row[1]:14.4f}{row[2]:8.3f}")
    ratio = statistics.median(ratios)
    print(f"median ratio {ratio:.3f}, wanted at most {WANTED:.2f}; start and end of a stage took {min(waits):.1f} s")
    sys.exit(ratio > WANTED)


if __name__ == "__main__":
    main()
