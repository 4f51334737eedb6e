"""Reading: what stands on the plate of a named colour, images at their own size beside squares of one size.

A white page shows two plates of different colours, 16 pixels high, each with a digit or a line of text in a font that
matplotlib ships. A colour is named, and what stands there is the answer; then the other. In training pages are of 64
pixels at first, then of 96, then of any side up to 640; they are scored by side, and on the largest a plate is one
fortieth of it. All models are the same but for how images reach them, see the same pages and train as long, encoder
included. Chance is one in ten.

Ways: `native`; `384`, a square of so many pixels, which enlarges small pages; `at-most-384`, which leaves them as they
are and shrinks larger ones to such a square, so that it learns what `native` learns for as long as nothing is lost.

python -m tests.benchmarks.studies.reading [--seeds 3] [--steps 1000] [--ways native at-most-384 384] [--lines]
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import preset
from tests.benchmarks.studies.recall import train

IMAGE, ANSWERS, PLATES, FIRST, PLATE, CELL = 1, 10, 2, 2, 16, 32
SIDES = (96, 160, 320, 640)
"""Sides of pages in pixels that are scored; in training they are of any from the first to the last."""
FIRST_SIDE = 64
PALETTE = ["#ffb050", "#50b0ff"]
"""As much green in each, so that what is read on one helps on the other."""
DIGITS = tuple("0123456789")
LINES = ("stare", "store", "stone", "shone", "shore", "score", "scare", "share", "shape", "slope")
"""Text lines: each is one or two letters from another."""
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold")
TOWER = {"towers": [{"model": "test_vit", "block": 0}], "merge": 2}


def vision_of(way: str) -> dict:
    """The vision part of a config, see the ways above."""
    most = SIDES[-1] if way == "native" else int(way.removeprefix("at-most-"))
    return {**TOWER, **({"image_size": most} if way.isdigit() else {"max_tokens": (most // CELL) ** 2})}


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
    config = preset(
        "tiny", FIRST + ANSWERS + PLATES, IMAGE, 4096, text=text, vision=vision_of(way), connector=connector
    )
    model = MLMambaForConditionalGeneration(config)
    # Images larger than words: without, the model had not learned to find a colour after 800 steps on small pages.
    model.connector.balance(8 * model.get_input_embeddings().weight.detach().std().item())
    return model


class Pages:
    """Endless pages.

    Args:
        step: plates stand at multiples of so many pixels within cells, which none shares.
        texts: what may stand on a plate. For more than a digit, plates are four times as wide, and cells twice.
    """

    def __init__(self, step: int, seed: int, texts: Sequence[str] = DIGITS):
        self.step, self.texts, self.draws = step, texts, np.random.default_rng(seed)
        self.cell, self.plate = (CELL, PLATE) if len(texts[0]) == 1 else (2 * CELL, 4 * PLATE)
        folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
        self.fonts = [ImageFont.truetype(folder / f"{name}.ttf", 15) for name in FONTS]

    def any_side(self, done: float) -> int:
        """Of four cells for the first 0.45 of the training, the smallest until 0.6, then any, small ones more often."""
        if done <= 0.45:
            return FIRST_SIDE
        most = SIDES[-1] - SIDES[0] if done > 0.6 else 0
        return SIDES[0] + CELL * round(most / CELL * self.draws.random() ** 3)

    def draw(self, side: int) -> tuple[Image.Image, np.ndarray]:
        """A page, and which of the texts stands on the plate of each colour."""
        page, shown = Image.new("RGB", (side, side), "white"), self.draws.integers(0, ANSWERS, PLATES)
        pen, across = ImageDraw.Draw(page), side // self.cell
        cells = self.draws.permutation(across * (side // CELL))[:PLATES]
        for colour, text, cell in zip(PALETTE, shown, cells, strict=True):
            row, column = divmod(int(cell), across)
            x = column * self.cell + self._within(self.cell - self.plate)
            y = row * CELL + self._within(CELL - PLATE)
            pen.rectangle((x, y, x + self.plate - 1, y + PLATE - 1), fill=colour)
            font = self.fonts[self.draws.integers(len(self.fonts))]
            pen.text((x + self.plate / 2, y + PLATE / 2), self.texts[text], font=font, fill="black", anchor="mm")
        return page, shown

    def _within(self, room: int) -> int:
        return self.step * int(self.draws.integers(room // self.step + 1))

    def batch(self, count: int, side: int, layout) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """The model's images, ids (n, l), and the answers (n, PLATES) to the colours in any order."""
        pages, shown = zip(*(self.draw(side) for _ in range(count)), strict=True)
        cuts = [layout.cut(page) for page in pages]
        order = torch.from_numpy(np.stack([self.draws.permutation(PLATES) for _ in pages]))
        answers = torch.from_numpy(np.stack(shown)).gather(1, order)
        pairs = torch.stack([FIRST + ANSWERS + order, FIRST + answers], 2).flatten(1)
        return layout.batch(cuts), torch.cat([torch.full((count, cuts[0].tokens), IMAGE), pairs], 1), answers


def logits_of_answers(model, images: dict, ids: torch.Tensor) -> torch.Tensor:
    """Of the answers (n, PLATES, ANSWERS), where a colour stands and its answer is next."""
    out = model(ids, **images, use_cache=False, logits_to_keep=2 * PLATES).logits
    return out[:, ::2, FIRST : FIRST + ANSWERS]


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
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--step", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--ways", nargs="+", default=["native", "at-most-384", "384"])
    parser.add_argument("--lines", action="store_true", help="text lines of five letters in place of digits")
    a = parser.parse_args()
    torch.set_num_threads(1)
    texts = LINES if a.lines else DIGITS
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        for way in a.ways:
            torch.manual_seed(seed)
            model = build(way)
            begun = time.process_time()
            pages = Pages(a.step, seed, texts)
            train(model, lambda step, m=model, of=pages: loss_of(m, of, step / a.steps, a.batch), a.steps, a.rate)
            right = {side: score(model, Pages(a.step, 10_000 + seed, texts), side) for side in SIDES}
            told = "  ".join(
                f"{side} px ({model.image_layout.count(side, side)} tokens) {share:.1%}"
                for side, share in right.items()
            )
            print(f"seed {seed}  {way:11}  {told}  {time.process_time() - begun:.0f} CPU seconds", flush=True)


if __name__ == "__main__":
    main()
