"""kill -9 of replicas under load: which requests fail, and how soon all is as before.

    python -m tests.benchmarks.drills.serve_kill

Two groups of clients ask a real Ray Serve all the time: plain ones, and ones that try again
(tests/helpers/serve_client.py). One replica after the other is killed; the next comes when all are back. Exits 1 unless
the plain clients saw at most the requests fail that were in flight at a kill, the patient ones none, and every answer
is the one of the model.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import ray
from transformers.utils.logging import disable_progress_bar

from tests.helpers.processes import free_port
from tests.helpers.serve_load import Clients, longest_silence, quantile, states, wait_until_all_serve
from tests.helpers.swap_models import answer_of, register_models, write_model
from workflows.runtime import quiet_libraries
from workflows.serve.start import serve_model
from workflows.tracking.tracker import connect

QUESTIONS = ["what is shown?", "what colour is it?", "is it round?"]
TOKENS = 24
PATIENCE = 300.0  # seconds


def main() -> int:
    """Run and print what happened. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--clients", type=int, default=16, help="half of them patient")
    parser.add_argument("--replicas", type=int, default=2)
    arguments = parser.parse_args()
    quiet_libraries()
    disable_progress_bar()
    ray.init("local", num_cpus=arguments.replicas, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory() as root:
        return _run(Path(root), arguments)


def _run(root: Path, arguments: argparse.Namespace) -> int:
    folder = write_model(root / "1", 1)
    expected = {question: answer_of(folder, question, tokens=TOKENS) for question in QUESTIONS}
    register_models(connect(root), "shapes", [folder], root / "packages")
    half = arguments.clients // 2
    options = {"replicas": arguments.replicas, "threads": 1, "block": False}
    with serve_model("models:/shapes@champion", root, port=free_port(), **options) as server:
        wait_until_all_serve(server.url, "shapes/1", arguments.replicas)
        with (
            Clients(server.url, half, QUESTIONS, TOKENS) as plain,
            Clients(server.url, half, QUESTIONS, TOKENS, PATIENCE) as patient,
        ):
            time.sleep(3)
            kills = [kill_one(server.url, arguments.replicas) for _ in range(arguments.kills)]
            time.sleep(3)
    ray.shutdown()
    return _report(arguments, plain, patient, kills, expected)


def kill_one(url: str, replicas: int) -> tuple[float, float]:
    """Kill one replica. Returns when, and the seconds until as many as before answer."""
    victim = random.choice(list(states(url, 10 * replicas)))
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    while True:
        try:
            seen = states(url, 10 * replicas)
        except Exception:  # with one replica, nobody is there for a moment
            seen = {}
        if len(seen) >= replicas and victim not in seen:
            return killed, time.monotonic() - killed
        assert time.monotonic() - killed < 300, "no replica came back within five minutes"
        time.sleep(0.2)


def failed_though_asked_later(plain: Clients, kills: list[tuple[float, float]]) -> int:
    """Failed requests that were in flight at no kill."""
    return sum(not any(one.began <= killed <= one.ended for killed, _ in kills) for one in plain.failed)


def _report(arguments, plain: Clients, patient: Clients, kills: list, expected: dict[str, str]) -> int:
    wrong = [a for a in plain.asked + patient.asked if not a.error and a.answer != expected[a.question]]
    later = failed_though_asked_later(plain, kills)
    every = plain.asked + patient.asked
    print(f"{arguments.kills} kills, {arguments.replicas} replicas, {arguments.clients} clients (half patient)")
    print(f"requests         plain {len(plain.asked):,}, patient {len(patient.asked):,}")
    print(f"failed           plain {len(plain.failed)}, of them not in flight at a kill {later}")
    print(
        f"                 patient {len(patient.failed)}, tried again {sum(a.tries - 1 for a in patient.asked)} times"
    )
    print(f"wrong answers    {len(wrong)}")
    print(f"longest silence  {longest_silence(every):.2f} s; longest request {quantile(every, 1):.2f} s")
    print(f"all replicas back after {' '.join(f'{seconds:.1f}' for _, seconds in kills)} s")
    for asked in (plain.failed + patient.failed + wrong)[:6]:
        print(f"  {asked}")
    return int(bool(wrong or later or patient.failed))


if __name__ == "__main__":
    sys.exit(main())
