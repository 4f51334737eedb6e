"""Corpora in LLaVA's layout for the preparation benchmarks: made-up images and texts of the real ones' sizes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

TEXT = (
    "the a of in on with and is are there two people sitting standing near large small wooden table window street car "
    "photo image shows background foreground color bright scene appears wearing holding white black red blue green "
    "suggests likely various objects including chairs bottles cups person dog cat building trees sky water grass"
)
WORDS = TEXT.split()


def write_corpus(root: Path, records: int, images: int, sides: tuple[int, int] = (336, 640), seed: int = 0) -> Path:
    """Write `records` conversations about `images` JPEG files, one image each, 6 in 100 without any.

    Args:
        root: folder; gets `records.json` and `images/`.
        records: how many. Each has a text of its own.
        images: how many files; record i shows file i modulo this.
        sides: least and most pixels of a side.
        seed: of everything.

    Returns:
        `root`.
    """
    folder = root / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(images):
        _image(rng, sides).save(folder / f"{i:06d}.jpg", quality=85)
    with open(root / "records.json", "w") as file:
        for i in range(records):
            file.write(("[" if i == 0 else ",\n") + json.dumps(_entry(rng, i, images)))
        file.write("]")
    return root


def data_config(root: Path, **changes) -> dict:
    """The data part of a recipe for a corpus, as plain data."""
    source = {"type": "llava", "annotations": str(root / "records.json"), "images": str(root / "images")}
    settings = {
        "train": [source],
        "tokenizer": {"train_vocab_size": 2000},
        "max_tokens": 4096,
        "partition_records": 250,
        "shard_rows": 64,
    }
    return settings | changes


def _image(rng: np.random.Generator, sides: tuple[int, int]) -> Image.Image:
    """Coarse colours under fine texture: compresses about as a photo does (1.3 bits a pixel at quality 85)."""
    width, height = (int(side) for side in rng.integers(sides[0], sides[1] + 1, 2))
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    base = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
    return Image.blend(base, noise.convert("RGB"), 0.35)


def _entry(rng: np.random.Generator, i: int, images: int) -> dict:
    def text(mean: float) -> str:
        return " ".join(rng.choice(WORDS, 1 + int(rng.lognormal(np.log(mean), 0.6))))

    shows = rng.random() >= 0.06
    conversation = []
    for turn in range(1 + int(rng.integers(0, 4))):
        opening = "<image>\n" if shows and not turn else ""
        conversation.append({"from": "human", "value": f"{opening}{text(10)}?"})
        # The number makes every record one of its kind; digit by digit, it makes no words that only one record has.
        conversation.append({"from": "gpt", "value": f"{text(35)}, number {' '.join(str(i))}."})
    return {"id": f"{i:07d}", **({"image": f"{i % images:06d}.jpg"} if shows else {}), "conversations": conversation}
