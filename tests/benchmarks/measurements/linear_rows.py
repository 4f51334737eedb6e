"""How fast a CPU reads a weight matrix for few rows: torch's linear layer against ours, as it is and compiled.

    python -m tests.benchmarks.measurements.linear_rows [--threads 2]

Printed per number of rows: the weights' bytes over the median time of each, in turns, and beside them the rate at which
this machine reads memory in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from mlmamba.ops.linear import linear

MATRICES, ROUNDS = 12, 15  # different matrices one after the other, as in a model: none is found in the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    weights = [torch.randn(3352, 768) for _ in range(MATRICES)]
    size = sum(w.nbytes for w in weights)
    memory = torch.ones(2**26)
    print(f"reading memory {memory.nbytes / _median([memory.sum])[0] / 1e9:.1f} GB/s")
    compiled = torch.compile(linear, dynamic=False)
    print(f"{'rows':>4} {'torch':>10} {'mlmamba':>10} {'compiled':>10}")
    for rows in range(1, 9):
        x = torch.randn(rows, 768)
        calls = [lambda f=f, x=x: [f(x, w) for w in weights] for f in (F.linear, linear, compiled)]
        with torch.no_grad():
            compiled(x, weights[0])
            rates = [size / seconds / 1e9 for seconds in _median(calls)]
        print(f"{rows:>4} " + " ".join(f"{rate:>5.1f} GB/s" for rate in rates))


def _median(calls: list[Callable]) -> list[float]:
    """Median seconds of each call, taken in turns."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, seconds in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]


if __name__ == "__main__":
    main()
