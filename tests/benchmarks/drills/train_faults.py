"""Training while its workers are killed: it must finish, in the weights of the undisturbed run to the last bit.

    python -m tests.benchmarks.drills.train_faults --kills 10

A stage of the tiny model runs on Ray Train with two workers. Each time the workers have come a random number of steps
past their start, one of them is killed with SIGKILL, wherever it is: in a step or in a save. Ray Train starts the group
again, and it goes on from the newest checkpoint that is whole. So it goes until all kills are done.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil
import ray

from tests.helpers.toy_stage import run_toy_stage, toy_recipe, training_workers
from tests.helpers.toy_training import difference, make_toy, same


class Killer:
    """An event callback that kills a worker now and then.

    Args:
        kills: how many in all.
        within: a kill comes this many steps after a start at most.
        seed: of which worker, and when.
    """

    def __init__(self, kills: int, within: int, seed: int):
        self.left, self._within, self._random = kills, within, random.Random(seed)
        self._due: int | None = None
        self.done: list[str] = []

    def __call__(self, event: dict) -> None:
        if event["event"] == "start":
            self._due = event["step"] + self._random.randint(1, self._within)
            if self.done:
                self.done[-1] += f", went on from step {event['step']}"
                print(self.done[-1], flush=True)
        elif event["event"] == "metrics" and self.left and self._due is not None and event["step"] >= self._due:
            time.sleep(self._random.random() * event["seconds_per_step"])
            workers = training_workers(psutil.Process())
            if len(workers) < 2:
                return
            victim = self._random.randrange(len(workers))
            workers[victim].kill()
            self.left, self._due = self.left - 1, None
            self.done.append(f"killed worker process {workers[victim].pid} after step {event['step']}")


def main() -> None:
    """Train undisturbed, then with kills, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        toy = make_toy(Path(folder) / "toy")
        stage = {"steps": arguments.steps, "batch_rows": 2}
        recipe = toy_recipe(toy, stage, save_every=3, max_failures=2 * arguments.kills)
        start = time.monotonic()
        whole = run_toy_stage(toy, Path(folder) / "whole", recipe)
        seconds = time.monotonic() - start
        print(f"undisturbed: {seconds:.0f} s, last loss {whole.losses[-1]:.6f}", flush=True)
        killer = Killer(arguments.kills, within=max(1, arguments.steps // (2 * arguments.kills)), seed=arguments.seed)
        start = time.monotonic()
        disturbed = run_toy_stage(toy, Path(folder) / "disturbed", recipe, killer)
        ray.shutdown()
        losses = {event["step"]: event["loss"] for event in whole.of("metrics")}
        wrong = [event["step"] for event in disturbed.of("metrics") if event["loss"] != losses[event["step"]]]
        equal = same(whole.weights, disturbed.weights)
        print(
            f"{len(killer.done)} kills, {len(disturbed.of('start'))} starts, {time.monotonic() - start:.0f} s; "
            f"{len(disturbed.losses)} losses reported, {len(wrong)} of them other than undisturbed; "
            f"largest difference of a weight {difference(whole.weights, disturbed.weights):.1e}"
        )
    sys.exit(bool(wrong) or not equal or len(killer.done) < arguments.kills)


if __name__ == "__main__":
    main()
