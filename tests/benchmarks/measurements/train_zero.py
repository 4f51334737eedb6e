"""The loss curves of ZeRO 0, 1, 2 and 3 on two workers, float32: the largest difference over 50 steps.

    python -m tests.benchmarks.measurements.train_zero --steps 50

The tiny model and data set of the integration tests, two processes joined by gloo, the training worker's own loop.
ZeRO 0 is plain data parallel training, so it is the peer of the others. Wanted: no difference over 1e-5.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.helpers.toy_training import Workers, difference, make_toy

WANTED = 1e-5


def main() -> None:
    """Train four times and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        toy, workers = make_toy(Path(folder) / "toy"), Workers(2)
        made = {}
        for zero_stage in range(4):
            job = toy.job(Path(folder) / str(zero_stage), {"steps": arguments.steps}, zero_stage=zero_stage)
            made[zero_stage] = workers.train(job)
        workers.close()
        print(f"{'ZeRO':>4}{'first loss':>14}{'last loss':>14}{'largest difference of a loss':>32}{'of a weight':>16}")
        worst = 0.0
        for zero_stage, outcome in made.items():
            losses = [abs(a - b) for a, b in zip(outcome.losses, made[0].losses, strict=True)]
            worst = max(worst, *losses)
            weights = difference(outcome.weights, made[0].weights)
            first, last = outcome.losses[0], outcome.losses[-1]
            print(f"{zero_stage:4}{first:14.6f}{last:14.6f}{max(losses):32.2e}{weights:16.2e}")
    print(f"{arguments.steps} steps; the largest difference of a loss is {worst:.2e}, wanted at most {WANTED:.0e}")
    sys.exit(worst > WANTED)


if __name__ == "__main__":
    main()
