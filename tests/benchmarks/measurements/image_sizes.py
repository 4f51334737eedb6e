"""What a token of an image costs by how many the image has, from 256 to 4,096: encoder, connector and language model.

At its own size, an image is one sequence of the encoder, whose attention grows with its length. In tiles, the encoder
reads squares of one size, however many. Connector and language model scan. CPU seconds of one process, all sizes in
turn; shapes are those of SigLIP 2 base and a Mamba-2 of width 768, two blocks of each.

python -m tests.benchmarks.measurements.image_sizes [--rounds 5] [--sides 16 24 32 48 64]
"""

import argparse
from functools import partial

import torch
from PIL import Image

from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import preset
from tests.benchmarks.measurements.hybrid import in_turn

PATCH, TILE = 16, 16


def build(way: str, most: int) -> MLMambaForConditionalGeneration:
    """A model whose encoder stops behind its second block."""
    tiles = {"image_size": PATCH * TILE, "tiles": most // TILE**2 - 1}
    model = "naflexvit_base_patch16_siglip" if way == "native" else "vit_base_patch16_siglip_256"
    vision = {"towers": [{"model": model, "block": 1}], **({"max_tokens": most} if way == "native" else tiles)}
    text = {"hidden_size": 768, "num_hidden_layers": 2, "chunk_size": 256, "head_dim": 64, "state_size": 128}
    connector = {"name": "vss_l2", "head_dim": 64, "state_size": 128, "chunk_size": 64, "hidden_size": None}
    return MLMambaForConditionalGeneration(
        preset("tiny", 1024, 1, 2 * most, text=text, vision=vision, connector=connector)
    ).eval()


def image_of(way: str, tokens: int) -> Image.Image:
    """One that has so many tokens: a square, or a strip of tiles."""
    if way == "native":
        side = PATCH * round(tokens**0.5)
        return Image.new("RGB", (side, side))
    tiles = max(1, tokens // TILE**2 - 1)
    return Image.new("RGB", (PATCH * TILE * tiles, PATCH * TILE))


@torch.inference_mode()
def parts(model: MLMambaForConditionalGeneration, shown: Image.Image) -> tuple[int, dict]:
    """Tokens of an image, and what is to be run for it."""
    cut = model.image_layout.cut(shown)
    batch = model.image_layout.batch([cut])
    shapes = batch.get("spatial_shapes")
    features = model.vision(**{"pixels": batch["pixel_values"], "spatial_shapes": shapes})
    grids = model.vision.grids(shapes)
    embeds = model.connector(features, grids).flatten(0, -2)[None]
    return cut.tokens, {
        "encoder": partial(model.vision, batch["pixel_values"], shapes),
        "connector": partial(model.connector, features, grids),
        "language model": partial(model, inputs_embeds=embeds, use_cache=True, logits_to_keep=1),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32, 48, 64])
    a = parser.parse_args()
    torch.set_num_threads(1)
    counts = [side * side for side in a.sides]
    print(f"{'':8}{'tokens':>8}  CPU microseconds a token, and times that of the least")
    for way in ("native", "tiles"):
        model = build(way, max(counts))
        found = [parts(model, image_of(way, count)) for count in counts]
        runs = {(tokens, name): run for tokens, own in found for name, run in own.items()}
        seconds = in_turn(runs, a.rounds)
        each = {key: 1e6 * value / key[0] for key, value in seconds.items()}
        for tokens, own in found:
            first = found[0][0]
            told = "  ".join(
                f"{name} {each[tokens, name]:7.1f} ({each[tokens, name] / each[first, name]:.2f})" for name in own
            )
            print(f"{way:8}{tokens:>8}  {told}", flush=True)


if __name__ == "__main__":
    main()
