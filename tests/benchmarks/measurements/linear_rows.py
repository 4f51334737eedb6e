"""How fast a CPU gets through a weight matrix, by rows: torch's linear layer against ours, as it is and packed.

    python -m tests.benchmarks.measurements.linear_rows [--threads 2]

Printed per number of rows: microseconds a layer, the median of rounds in turns, and how many times torch's speed that
is; and the rate at which this machine reads memory in the same run.
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

MATRICES, ROUNDS = 12, 9  # different matrices one after the other, as in a model: none is found in the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    memory = torch.ones(2**26)
    print(f"reading memory {memory.nbytes / _median([memory.sum])[0] / 1e9:.1f} GB/s")
    with torch.no_grad():
        layers = [torch.nn.Linear(768, 3352, bias=False) for _ in range(MATRICES)]
        packed = {form: [PackedLinear(layer, form) for layer in layers] for form in PACKED}
        packed["our int8"] = [PackedLinear(layer, "int8") for layer in layers]
        for layer in packed["our int8"]:
            layer.use(compiled.operators(make=True))
        print(f"{'rows':>4} {'torch':>10} {'unpacked':>15} " + " ".join(f"{form:>15}" for form in packed))
        for rows in (1, 2, 3, 4, 8, 16, 32, 128, 512):
            x = torch.randn(rows, 768)
            calls = [lambda f=f, x=x: [f(x, layer.weight) for layer in layers] for f in (F.linear, linear)]
            calls += [lambda own=own, x=x: [layer(x) for layer in own] for own in packed.values()]
            first, *others = (seconds / MATRICES * 1e6 for seconds in _median(calls))
            print(f"{rows:>4} {first:>8,.0f}us " + " ".join(f"{own:>8,.0f}us {first / own:4.1f}x" for own in others))


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
