"""Training on nodes that come and go: it must end in the loss of the undisturbed run.

    python -m tests.benchmarks.drills.train_spot --losses 20

A stage of the tiny model trains with `workers: [1, 2]` on a cluster of processes: a head without a CPU and two nodes
with one each. A random number of steps after training has begun on both, one of them is lost at random: in turns all
its processes are killed at once, it is drained and gone when the notice is over, or it gets SIGTERM. Another comes a
random time later, sometimes before training has begun again and sometimes long after. No failure of a worker is
allowed (`max_failures` 0): every loss must be known for one.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.toy_stage import run_toy_stage, toy_recipe
from tests.helpers.toy_training import difference, make_toy
from tests.helpers.weather import Weather, sky
from workflows.train import trainer


def main() -> None:
    """Train undisturbed, then with losses, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--back", type=float, default=10.0, help="seconds until another node comes, at most")
    parser.add_argument("--notice", type=float, default=20.0, help="seconds of notice")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    trainer._GROW = 2.0
    with tempfile.TemporaryDirectory() as folder, sky() as address:
        weather = Weather(address, 2, a.losses, back=a.back, notice=a.notice, seed=a.seed)
        toy = make_toy(Path(folder) / "toy")
        stage = {"steps": a.steps, "batch_rows": 8}
        settings = {"workers": [1, 2], "save_every": a.save_every, "max_failures": 0, "max_lost_nodes": a.losses}
        recipe = toy_recipe(toy, stage, **settings)
        start = time.monotonic()
        whole = run_toy_stage(toy, Path(folder) / "whole", toy_recipe(toy, stage, workers=2))
        seconds = time.monotonic() - start
        print(f"undisturbed: {seconds:.0f} s, last loss {whole.losses[-1]:.7f}", flush=True)

        def tell(event: dict) -> None:
            if event["event"] in ("failure", "note", "start"):
                step, seconds = event.get("step", weather.step), time.monotonic() - start
                print(f"{seconds:6.0f} s  step {step:>4}  {event['text'][:110]}", flush=True)
            weather(event)

        start = time.monotonic()
        disturbed = run_toy_stage(toy, Path(folder) / "disturbed", recipe, tell)
        took = time.monotonic() - start
        weather.settle()
        losses = {event["step"]: event["loss"] for event in whole.of("metrics")}
        apart = [abs(event["loss"] - losses[event["step"]]) for event in disturbed.of("metrics")]
        noticed = [steps for how, steps in weather.again if how != "killed"]
        killed = [steps for how, steps in weather.again if how == "killed"]
        last = abs(disturbed.losses[-1] - whole.losses[-1])
        print(
            f"{len(weather.lost)} losses, {len(disturbed.of('start'))} starts on "
            f"{weather.workers} workers, {took:.0f} s\n"
            f"steps taken again: {sum(noticed)} after {len(noticed)} notices and returns, {sum(killed)} after "
            f"{len(killed)} kills\n"
            f"last loss {disturbed.losses[-1]:.7f}, {last:.1e} from the undisturbed one; at any step at most "
            f"{max(apart):.1e}; largest difference of a weight {difference(whole.weights, disturbed.weights):.1e}"
        )
    sys.exit(len(weather.lost) < a.losses or sum(noticed) > 0 or last > 1e-5)


if __name__ == "__main__":
    main()
