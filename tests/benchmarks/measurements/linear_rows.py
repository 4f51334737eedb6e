"""How fast a CPU gets through a weight matrix, by rows: torch's linear layer against ours, as it is and packed.

    python -m tests.benchmarks.measurements.linear_rows [--threads 2] [--rows 1 8 32 512]

In each form weights are packed for oneDNN (int8: for torch's kernel) and, as "our", for the product in our C++. Printed
per number of rows: CPU microseconds a layer, the median of rounds in turns, and how many times torch's speed that is;
and the rate at which this machine reads memory in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from mlmamba.ops import compiled
from mlmamba.ops.linear import linear
from mlmamba.ops.packed import PACKED, PackedLinear

MATRICES, ROUNDS = 24, 9  # different matrices one after the other, as in a model: none is found in the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 2, 3, 4, 8, 16, 32, 128, 512))
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    memory = torch.ones(2**26)
    print(f"reading memory {memory.nbytes / _median([memory.sum])[0] / 1e9:.1f} GB/s")
    with torch.no_grad():
        layers = [torch.nn.Linear(768, 3352, bias=False) for _ in range(MATRICES)]
        packed = {form: [PackedLinear(layer, form) for layer in layers] for form in PACKED}
        own = compiled.operators(make=True)
        packed |= {f"our {form}": [PackedLinear(layer, form, own) for layer in layers] for form in PACKED}
        print(f"{'rows':>4} {'torch':>10} {'unpacked':>15} " + " ".join(f"{form:>15}" for form in packed))
        for rows in a.rows:
            x = torch.randn(rows, 768)
            calls = [lambda f=f, x=x: [f(x, layer.weight) for layer in layers] for f in (F.linear, linear)]
            calls += [lambda own=own, x=x: [layer(x) for layer in own] for own in packed.values()]
            first, *others = (seconds / MATRICES * 1e6 for seconds in _median(calls))
            print(f"{rows:>4} {first:>8,.0f}us " + " ".join(f"{own:>8,.0f}us {first / own:4.1f}x" for own in others))


def _median(calls: list[Callable]) -> list[float]:
    """Median CPU seconds of each call, taken in turns."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, seconds in zip(calls, taken, strict=True):
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
    return [statistics.median(seconds) for seconds in taken]


if __name__ == "__main__":
    main()
