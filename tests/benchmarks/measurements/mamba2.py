"""The Mamba-2 backbone against transformers', same weights and inputs, in one process.

    python -m tests.benchmarks.measurements.mamba2 [--threads 2] [--rounds 7] [--prepare] [--device cuda]

Shape: width 768 as mamba2-130m, 4 layers. Each round times both, one after the other, so that a busy machine hits both;
printed are the medians, the median ratio, and the share of this machine's own limit that each reaches. The limits are
measured in the same run: the fp32 matrix product for prefill and training, reading memory for decoding. The work
counted is what the model needs at least: projections, convolution and the recurrence, three times that with gradients;
for decoding, every weight once and the state in and out.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import Mamba2Config, Mamba2Model
from transformers.utils import logging

from mlmamba.decoding import pack
from mlmamba.mamba2 import Mamba2Backbone

WIDTH, LAYERS, HEADS, HEAD_DIM, STATE = 768, 4, 24, 64, 128


def models(device: str) -> tuple[Mamba2Model, Mamba2Backbone]:
    """transformers' and ours, with the same weights."""
    config = Mamba2Config(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        state_size=STATE,
        n_groups=1,
        chunk_size=256,
        vocab_size=1024,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    theirs = Mamba2Model(config)
    ours = Mamba2Backbone(config)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval().to(device), ours.eval().to(device)


def seconds(call: Callable[[], object], repeat: int, device: str) -> float:
    """Mean seconds of `repeat` calls in a row."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    _wait(device)
    return (time.perf_counter() - start) / repeat


def compare(theirs: Callable, ours: Callable, rounds: int, repeat: int, device: str) -> tuple[float, float, float]:
    """Median seconds of both and the median of the rounds' ratios."""
    theirs(), ours()
    pairs = [(seconds(theirs, repeat, device), seconds(ours, repeat, device)) for _ in range(rounds)]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    return a, b, statistics.median(x / y for x, y in pairs)


def limits(device: str, rounds: int) -> tuple[float, float]:
    """Flops per second of a large fp32 matrix product and bytes per second of reading memory, best of the rounds."""
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device)
    memory = torch.ones(2**26, device=device)  # 256 MiB, larger than any cache
    product = min(seconds(lambda: a @ a, 2, device) for _ in range(rounds))
    reading = min(seconds(memory.sum, 2, device) for _ in range(rounds))
    return 2 * size**3 / product, memory.nbytes / reading


def flops_per_token() -> int:
    inner = HEADS * HEAD_DIM
    conv = inner + 2 * STATE
    projections = WIDTH * (inner + conv + HEADS) + inner * WIDTH
    return LAYERS * 2 * (projections + 4 * conv + 2 * inner * STATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prepare", action="store_true", help="decoding also as a service does it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    device, rounds = options.device, options.rounds
    theirs, ours = models(device)
    rows = []

    for length, train in ((1024, False), (4096, False), (1024, True)):
        x = torch.randn(1, length, WIDTH, device=device)

        def run(model: torch.nn.Module, train=train, x=x) -> None:
            with torch.set_grad_enabled(train):
                out = model(inputs_embeds=x).last_hidden_state if model is theirs else model(x)[0]
            if train:
                model.zero_grad()
                out.sum().backward()

        result = compare(lambda run=run: run(theirs), lambda run=run: run(ours), rounds, 1, device)
        work = flops_per_token() * length * (3 if train else 1)
        rows.append((f"{'forward + backward' if train else 'prefill'}, {length:,} tokens", *result, work, "flops"))

    with torch.no_grad():
        x = torch.randn(1, 1, WIDTH, device=device)
        their_state = theirs(inputs_embeds=x, use_cache=True).cache_params
        _, our_state = ours(x)
        our_state = our_state.in_place()  # as `generate` decodes, and as transformers does
        weights = sum(p.nbytes for p in ours.layers.parameters())

        def decode() -> tuple[float, float, float]:
            def step() -> None:
                theirs(inputs_embeds=x, cache_params=their_state, use_cache=True)

            return compare(step, lambda: ours(x, our_state), rounds, 50, device)

        work = weights + 2 * our_state.nbytes
        rows.append(("decoding, batch 1", *decode(), work, "bytes"))
        if options.prepare:
            pack(ours, "fp32")
            rows.append((f"decoding, {ours.prepare_decoding(make=True)}", *decode(), work, "bytes"))

    flops, reading = limits(device, rounds)
    print(
        f"{device}, {options.threads} threads: fp32 product {flops / 1e9:.0f} Gflop/s, reading {reading / 1e9:.1f} GB/s"
    )
    print(f"{'':28}{'transformers':>14}{'mlmamba':>12}{'ratio':>8}   share of the limit")
    for name, a, b, ratio, work, unit in rows:
        limit = flops if unit == "flops" else reading
        shares = f"{work / a / limit:6.0%} -> {work / b / limit:.0%} of {'product' if unit == 'flops' else 'reading'}"
        print(f"{name:28}{a * 1e3:11.1f} ms{b * 1e3:9.1f} ms{ratio:7.2f}x {shares}")


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
