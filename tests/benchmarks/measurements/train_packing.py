"""Packed rows against padded batches: useful tokens per second of a training step, on lengths like LLaVA's.

    python -m tests.benchmarks.measurements.train_packing --samples 256 --rounds 5

One Mamba-2 language model, random embeddings in place of text and images (the encoder's work is the same for both),
forward and backward over all samples, four ways in turns: batches of `--batch` samples in random order, padded to the
longest; the same, but with samples of like length together, which needs no packing yet ties length to what is learned
in one step; the project's packed rows, as long as the longest sample; and rows twice as long, half as many at once
(`data.max_tokens` is free: a recurrent model has no longest length, and longer rows are filled better). Useful tokens
are those that are no padding. Wanted: packed in the longer rows at least 1.5 times padded in random order.

Lengths are an assumption, not a measurement: 94 % of samples have an image (729 tokens) and log-normal text with a
median of 150 tokens (sigma 0.8), as short answers and long descriptions give together; 6 % are text alone with a median
of 900. All are cut to 2777, ML-Mamba's longest. `--scale` divides everything, to fit a CPU.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from mlmamba.configuration import Mamba2TextConfig
from mlmamba.mamba2 import Mamba2LanguageModel
from pipelines.planner import plan_rows

WANTED = 1.5
IMAGE, LONGEST, VOCABULARY, WIDTH = 729, 2777, 2048, 256


def lengths_like_llava(count: int, scale: int, seed: int) -> np.ndarray:
    """Tokens of so many samples."""
    rng = np.random.default_rng(seed)
    with_image = IMAGE + rng.lognormal(np.log(150), 0.8, count)
    text_alone = rng.lognormal(np.log(900), 0.6, count)
    lengths = np.where(rng.random(count) < 0.94, with_image, text_alone).clip(16, LONGEST)
    return (lengths / scale).astype(np.int64).clip(4)


def padded(lengths: np.ndarray, order: np.ndarray, batch: int) -> list[dict[str, torch.Tensor]]:
    """Batches of samples, padded on the right to the longest of each."""
    batches = []
    for first in range(0, len(order), batch):
        own = lengths[order[first : first + batch]]
        mask = torch.arange(int(own.max()))[None] < torch.from_numpy(own)[:, None]
        batches.append({"mask": mask, "seq_idx": None})
    return batches


def packed(lengths: np.ndarray, max_tokens: int, rows: int) -> list[dict[str, torch.Tensor]]:
    """Batches of so many packed rows; what is left of a row is a sequence of its own."""
    plan, batches = plan_rows(lengths, max_tokens), []
    for first in range(0, len(plan), rows):
        some = plan[first : first + rows]
        seq_idx = torch.zeros(len(some), max_tokens, dtype=torch.int32)
        mask = torch.zeros(len(some), max_tokens, dtype=torch.bool)
        for i, row in enumerate(some):
            numbers = np.repeat(np.arange(len(row)), lengths[row])
            seq_idx[i, : len(numbers)] = torch.from_numpy(numbers)
            seq_idx[i, len(numbers) :] = len(row)
            mask[i, : len(numbers)] = True
        batches.append({"mask": mask, "seq_idx": seq_idx})
    return batches


def train(model: Mamba2LanguageModel, batches: list[dict], is_packed: bool) -> float:
    """Forward and backward over all batches. Returns the seconds."""
    start = time.perf_counter()
    for batch in batches:
        mask, seq_idx = batch["mask"], batch["seq_idx"]
        embeds = torch.randn(*mask.shape, WIDTH)
        hidden, _ = model.backbone(embeds, None, None if is_packed else mask, seq_idx)
        keep = mask[:, 1:] & mask[:, :-1]
        if is_packed:
            keep = keep & (seq_idx[:, 1:] == seq_idx[:, :-1])
        logits = model.lm_head(hidden[:, :-1][keep])
        F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64)).backward()
        model.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    """Time the three in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="samples in a padded batch")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    config = Mamba2TextConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_heads=8, head_dim=64, state_size=64, n_groups=1, chunk_size=64,
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Mamba2LanguageModel(config).train()
    lengths = lengths_like_llava(arguments.samples, arguments.scale, arguments.seed)
    useful = int(lengths.sum())
    shuffled = np.random.default_rng(arguments.seed).permutation(len(lengths))
    max_tokens = LONGEST // arguments.scale
    rows = max(1, round(arguments.batch * lengths.mean() / max_tokens))
    half = max(1, round(rows / 2))
    ways: dict[str, Callable[[], list[dict]]] = {
        "padded, random order": lambda: padded(lengths, shuffled, arguments.batch),
        "padded, like lengths together": lambda: padded(lengths, np.argsort(lengths), arguments.batch),
        "packed": lambda: packed(lengths, max_tokens, rows),
        "packed, rows twice as long": lambda: packed(lengths, 2 * max_tokens, half),
    }
    made = {name: make() for name, make in ways.items()}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, batches in made.items():
            seconds = train(model, batches, name.startswith("packed"))
            if turn:  # the first is for warming up
                rates[name].append(useful / seconds)
    print(f"{arguments.samples} samples, mean {lengths.mean():.0f} tokens, longest {lengths.max()}")
    print(f"{'':32}{'positions used':>16}{'useful tokens/s':>18}{'of padded':>12}")
    base = rates["padded, random order"]
    for name, own in rates.items():
        used = useful / sum(batch["mask"].numel() for batch in made[name])
        ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
        print(f"{name:32}{used:16.1%}{statistics.median(own):18,.0f}{ratio:12.2f}")
    print(f"wanted: the last at least {WANTED} of padded in random order")
    sys.exit(ratio < WANTED)


if __name__ == "__main__":
    main()
