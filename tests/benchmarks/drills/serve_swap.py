"""Promotions and rollbacks under load: failed requests, answers that mix versions, and the longest pause.

    python -m tests.benchmarks.drills.serve_swap

A real Ray Serve and a real registry. Clients ask all the time while the alias goes to and fro between two models that
answer differently; every answer must be the one that the version in its header gives, with the same version in its
body. The peer is the same load in the same run with nobody moving the alias. Exits 1 unless no request failed, none
mixed versions, and every move was followed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import psutil
import ray
from transformers.utils.logging import disable_progress_bar

from tests.helpers.processes import free_port
from tests.helpers.serve_load import Asked, Clients, longest_silence, quantile, states, wait_until_all_serve
from tests.helpers.swap_models import answer_of, register_models, write_model
from workflows.registry import promote, rollback
from workflows.runtime import quiet_libraries
from workflows.serve.start import serve_model
from workflows.serve.swap import SwapOptions
from workflows.tracking.tracker import connect

QUESTIONS = ["what is shown?", "what colour is it?", "is it round?", "how many are there?", "where is the square?"]
TOKENS = 24


def main() -> int:
    """Run and print a table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=20, help="promotions and rollbacks, in turns")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--poll-seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    quiet_libraries()
    disable_progress_bar()
    ray.init("local", num_cpus=arguments.replicas, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory() as root:
        return _run(Path(root), arguments)


def _run(root: Path, arguments: argparse.Namespace) -> int:
    folders = {f"shapes/{number}": write_model(root / str(number), number) for number in (1, 2)}
    expected = {(v, q): answer_of(folder, q, tokens=TOKENS) for v, folder in folders.items() for q in QUESTIONS}
    client = connect(root)
    register_models(client, "shapes", list(folders.values()), root / "packages")
    swap = SwapOptions(poll_seconds=arguments.poll_seconds)
    options = {"replicas": arguments.replicas, "threads": 1, "swap": swap, "block": False}
    with serve_model("models:/shapes@champion", root, port=free_port(), **options) as server:
        wait_until_all_serve(server.url, "shapes/1", arguments.replicas)
        with Clients(server.url, arguments.clients, QUESTIONS, TOKENS):
            time.sleep(5)  # first requests are slow
        memory = _memory(server.url)
        with Clients(server.url, arguments.clients, QUESTIONS, TOKENS) as moving:
            followed = []
            for move in range(arguments.moves):
                done = rollback(client, "shapes") if move % 2 else promote(client, "shapes", "2")
                assert done.moved, done
                followed.append(wait_until_all_serve(server.url, f"shapes/{done.version}", arguments.replicas))
        duration = max(a.ended for a in moving.asked) - min(a.began for a in moving.asked)
        with Clients(server.url, arguments.clients, QUESTIONS, TOKENS) as still:
            time.sleep(duration)
        grown = _memory(server.url) - memory
    ray.shutdown()
    return _report(arguments, moving, still, expected, followed, grown)


def _report(arguments, moving: Clients, still: Clients, expected: dict, followed: list[float], grown: float) -> int:
    mixed = [a for a in moving.asked if not a.error and not _one_version(a, expected)]
    versions = {a.header for a in moving.asked if not a.error}
    print(
        f"{arguments.moves} moves, {arguments.clients} clients, {arguments.replicas} replicas, polling every ", end=""
    )
    print(f"{arguments.poll_seconds:g} s")
    print(f"{'':24}{'moving':>12}{'still':>12}{'ratio':>8}")
    for name, of in (
        ("requests", lambda c: len(c.asked)),
        ("failed", lambda c: len(c.failed)),
        ("median, s", lambda c: quantile(c.asked, 0.5)),
        ("p99, s", lambda c: quantile(c.asked, 0.99)),
        ("longest request, s", lambda c: quantile(c.asked, 1)),
        ("longest silence, s", lambda c: longest_silence(c.asked)),
    ):
        a, b = of(moving), of(still)
        ratio = f"{a / b:8.2f}" if b else f"{'-':>8}"
        print(f"{name:24}{a:12.3f}{b:12.3f}{ratio}" if isinstance(a, float) else f"{name:24}{a:12,}{b:12,}{ratio}")
    ordered = sorted(followed)
    print(f"answers that mix versions: {len(mixed)}; versions seen: {', '.join(sorted(versions))}")
    print(f"all replicas follow after {ordered[len(ordered) // 2]:.1f} s (median), {ordered[-1]:.1f} s (longest)")
    print(f"replicas' memory grew by {grown / 2**20:.0f} MiB over {arguments.moves} moves")
    for asked in (moving.failed + mixed)[:5]:
        print(f"  {asked}")
    return int(bool(moving.failed or mixed or len(versions) != 2))


def _one_version(asked: Asked, expected: dict[tuple[str, str], str]) -> bool:
    return asked.header == asked.fingerprint and asked.answer == expected[asked.header, asked.question]


def _memory(url: str) -> float:
    return sum(psutil.Process(pid).memory_info().rss for pid in states(url))


if __name__ == "__main__":
    sys.exit(main())
