"""Recall in images: which colour had the glyph that is named two hundred tokens later, pure Mamba-2 beside hybrids.

An image shows a grid of distinct glyphs, each in a colour. Random words follow, and then names of glyphs, whose colours
are the answers (the associative recall of Arora et al. 2023, with keys and values that are seen together). Both models
have the same width, about as many parameters, the same frozen encoder and the same samples: in training any number of
words up to 200 between image and questions, and 200 when it is scored. Chance is one in eight.

python -m tests.benchmarks.studies.recall [--seeds 3] [--steps 500] [--side 4] [--filler 200]
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import preset

IMAGE, COLOURS, PATCH, QUERIES, WORDS = 1, 8, 16, 8, 32
PALETTE = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(COLOURS)], dtype=torch.uint8) * 200 + 40
MODELS = {
    "mamba2": ["mamba2", "mamba2"],
    "hybrid": ["mamba2", "attention", "mlp"],
}


def build(kinds: list[str], side: int, width: int, state: int) -> MLMambaForConditionalGeneration:
    text = {
        "layers": kinds,
        "hidden_size": width,
        "state_size": state,
        "head_dim": 16,
        "chunk_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attention_head_dim": width // 4,
        "mlp_size": width,
        "max_position_embeddings": 4096,
    }
    vision = {"towers": [{"model": "test_vit", "block": -2}], "image_size": side * PATCH}
    connector = {"name": "mlp", "hidden_size": 2 * width}
    vocabulary = 2 + COLOURS + side * side + WORDS
    return MLMambaForConditionalGeneration(
        preset("tiny", vocabulary, IMAGE, 4096, text=text, vision=vision, connector=connector)
    )


class Samples:
    """Endless samples: pixels (n, 3, s, s), ids (n, l) and, at queries, the answers (n, QUERIES)."""

    def __init__(self, side: int, filler: int, seed: int):
        self.cells, self.side, self.filler = side * side, side, filler
        self.generator = torch.Generator().manual_seed(seed)
        glyphs = torch.Generator().manual_seed(0)
        self.glyphs = (
            torch.rand(self.cells, 4, 4, generator=glyphs).lt(0.5).repeat_interleave(4, 1).repeat_interleave(4, 2)
        )

    def draw(self, count: int, whole: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`whole` for all the words between image and questions; else any number of them, shorter ones more often."""
        g, n = self.generator, self.cells
        filler = self.filler if whole else int(self.filler * torch.rand(1, generator=g).square())
        shown = torch.rand(count, n, generator=g).argsort(1)
        colours = torch.randint(COLOURS, (count, n), generator=g)
        cells = self.glyphs[shown][:, :, None] * PALETTE[colours][..., None, None]
        pixels = cells.view(count, self.side, self.side, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        pixels = pixels.reshape(count, 3, self.side * PATCH, self.side * PATCH)
        asked = torch.rand(count, n, generator=g).argsort(1)[:, :QUERIES]
        answers = colours.gather(1, asked)
        first = 2 + COLOURS
        words = torch.randint(first + n, first + n + WORDS, (count, filler), generator=g)
        queries = first + shown.gather(1, asked)
        pairs = torch.stack([queries, 2 + answers], 2).flatten(1)
        ids = torch.cat([torch.full((count, n), IMAGE), words, pairs], 1)
        return pixels, ids, answers


def logits_of_answers(model, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of the colours (n, QUERIES, COLOURS), where a query stands and its answer is next."""
    out = model(ids, pixels, use_cache=False, logits_to_keep=2 * QUERIES).logits
    return out[:, ::2, 2 : 2 + COLOURS]


def train(model, loss_of: Callable[[int], torch.Tensor], steps: int, rate: float) -> None:
    """AdamW and one cycle of its rate over what trains of a model; `loss_of` a step's number. Prints losses."""
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            print(f"  {step + 1} {loss.item():.3f}", flush=True)


def loss_of(model, samples: Samples, batch: int) -> torch.Tensor:
    pixels, ids, answers = samples.draw(batch, whole=False)
    return F.cross_entropy(logits_of_answers(model, pixels, ids).flatten(0, 1), answers.flatten())


@torch.no_grad()
def score(model, samples: Samples, count: int = 256) -> float:
    model.eval()
    right = 0
    for _ in range(count // 64):
        pixels, ids, answers = samples.draw(64)
        right += (logits_of_answers(model, pixels, ids).argmax(-1) == answers).sum().item()
    return right / (count // 64 * 64 * QUERIES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--side", type=int, default=4)
    parser.add_argument("--filler", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--state", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    a = parser.parse_args()
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        for name in a.models:
            torch.manual_seed(seed)
            model = build(MODELS[name], a.side, a.width, a.state)
            count = sum(p.numel() for p in model.language_model.parameters())
            begun = time.process_time()
            size = f"{name:8} {count:>8,} parameters"
            model.vision.requires_grad_(False)
            samples = Samples(a.side, a.filler, seed)
            train(model, lambda step, m=model, of=samples: loss_of(m, of, a.batch), a.steps, a.rate)
            right = score(model, Samples(a.side, a.filler, 10_000 + seed))
            print(
                f"seed {seed}  {size}  {right:6.1%}  {time.process_time() - begun:.0f} CPU seconds",
                flush=True,
            )


if __name__ == "__main__":
    main()
