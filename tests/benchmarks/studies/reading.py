"""Reading: which digit stands on the plate of a named colour, images at their own size beside squares of one size.

A white page shows two plates of different colours, 16 pixels high, each with a digit in a font that matplotlib ships.
A colour is named, and the digit is the answer; then the other. In training pages are small at first, then of any side
from 96 to 640 pixels; they are scored by side, and on the largest a plate is one fortieth of it. Both models are the
same but for how images reach them, see the same pages and train as long, encoder included. Chance is one in ten.

python -m tests.benchmarks.studies.reading [--seeds 3] [--steps 800] [--ways native 384 192 96]
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import preset
from tests.benchmarks.studies.recall import train

IMAGE, DIGITS, PLATES, FIRST, PLATE, CELL = 1, 10, 2, 2, 16, 32
SIDES = (96, 160, 320, 640)
"""Sides of pages in pixels that are scored; in training they are of any from the first to the last."""
PALETTE = ["#ff5050", "#50ffff"]
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold")
TOWER = {"towers": [{"model": "test_vit", "block": 0}], "merge": 2}


def vision_of(way: str) -> dict:
    """The vision part of a config: at their own size, or as squares of so many pixels."""
    return {**TOWER, **({"max_tokens": (SIDES[-1] // CELL) ** 2} if way == "native" else {"image_size": int(way)})}


def build(way: str, width: int = 64) -> MLMambaForConditionalGeneration:
    text = {
        "layers": ["mamba2", "attention", "mlp"],
        "hidden_size": width,
        "state_size": 16,
        "head_dim": 16,
        "chunk_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attention_head_dim": width // 4,
        "mlp_size": width,
        "max_position_embeddings": 4096,
    }
    connector = {"name": "mlp", "hidden_size": 2 * width}
    config = preset("tiny", FIRST + DIGITS + PLATES, IMAGE, 4096, text=text, vision=vision_of(way), connector=connector)
    model = MLMambaForConditionalGeneration(config)
    # Images larger than words: without, the model had not learned to find a colour after 800 steps on small pages.
    model.connector.balance(8 * model.get_input_embeddings().weight.detach().std().item())
    return model


class Pages:
    """Endless pages.

    Args:
        step: plates stand at multiples of so many pixels within cells of 32, which none shares.
    """

    def __init__(self, step: int, seed: int):
        self.step, self.draws = step, np.random.default_rng(seed)
        folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
        self.fonts = [ImageFont.truetype(folder / f"{name}.ttf", 15) for name in FONTS]

    def any_side(self, done: float) -> int:
        """The smallest for the first 0.6 of the training, then any, small ones more often."""
        most = SIDES[-1] - SIDES[0] if done > 0.6 else 0
        return SIDES[0] + CELL * round(most / CELL * self.draws.random() ** 3)

    def draw(self, side: int) -> tuple[Image.Image, np.ndarray]:
        """A page, and the digit on the plate of each colour."""
        page, digits = Image.new("RGB", (side, side), "white"), self.draws.integers(0, DIGITS, PLATES)
        pen, across = ImageDraw.Draw(page), side // CELL
        cells = self.draws.permutation(across * across)[:PLATES]
        for colour, digit, cell in zip(PALETTE, digits, cells, strict=True):
            x, y = (
                int(place) * CELL + self.step * int(self.draws.integers((CELL - PLATE) // self.step + 1))
                for place in divmod(cell, across)
            )
            pen.rectangle((x, y, x + PLATE - 1, y + PLATE - 1), fill=colour)
            font = self.fonts[self.draws.integers(len(self.fonts))]
            middle = (x + PLATE / 2, y + PLATE / 2)
            pen.text(middle, str(digit), font=font, fill="black", anchor="mm")
        return page, digits

    def batch(self, count: int, side: int, layout) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """The model's images, ids (n, l), and the answers (n, PLATES) to the colours in any order."""
        pages, digits = zip(*(self.draw(side) for _ in range(count)), strict=True)
        cuts = [layout.cut(page) for page in pages]
        order = torch.from_numpy(np.stack([self.draws.permutation(PLATES) for _ in pages]))
        answers = torch.from_numpy(np.stack(digits)).gather(1, order)
        pairs = torch.stack([FIRST + DIGITS + order, FIRST + answers], 2).flatten(1)
        return layout.batch(cuts), torch.cat([torch.full((count, cuts[0].tokens), IMAGE), pairs], 1), answers


def logits_of_answers(model, images: dict, ids: torch.Tensor) -> torch.Tensor:
    """Of the digits (n, PLATES, DIGITS), where a colour stands and its digit is next."""
    out = model(ids, **images, use_cache=False, logits_to_keep=2 * PLATES).logits
    return out[:, ::2, FIRST : FIRST + DIGITS]


def loss_of(model, pages: Pages, share: float, batch: int) -> torch.Tensor:
    """Of one batch, `share` of the training being over; large pages are fewer in it."""
    side = pages.any_side(share)
    count = max(2, round(batch * min(1, (2 * SIDES[0] / side) ** 2)))
    images, ids, answers = pages.batch(count, side, model.image_layout)
    return F.cross_entropy(logits_of_answers(model, images, ids).flatten(0, 1), answers.flatten())


@torch.no_grad()
def score(model, pages: Pages, side: int, count: int = 128) -> float:
    model.eval()
    right = 0
    for _ in range(count // 16):
        images, ids, answers = pages.batch(16, side, model.image_layout)
        right += (logits_of_answers(model, images, ids).argmax(-1) == answers).sum().item()
    return right / (count // 16 * 16 * PLATES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--step", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--ways", nargs="+", default=["native", "384", "192", "96"])
    a = parser.parse_args()
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        for way in a.ways:
            torch.manual_seed(seed)
            model = build(way)
            begun = time.process_time()
            pages = Pages(a.step, seed)
            train(model, lambda step, m=model, of=pages: loss_of(m, of, step / a.steps, a.batch), a.steps, a.rate)
            right = {side: score(model, Pages(a.step, 10_000 + seed), side) for side in SIDES}
            told = "  ".join(
                f"{side} px ({model.image_layout.count(side, side)} tokens) {share:.1%}"
                for side, share in right.items()
            )
            print(f"seed {seed}  {way:6}  {told}  {time.process_time() - begun:.0f} CPU seconds", flush=True)


if __name__ == "__main__":
    main()
