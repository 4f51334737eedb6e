"""Ten disguises of photographs, and how many of them are found at which share of false alarms (pipelines/looks.py).

    python -m tests.benchmarks.studies.near_duplicates FOLDER

FOLDER holds photographs. Each is cut into tiles that do not overlap, which stand for photographs of their own: that is
harder than whole ones, as tiles of a wall or of the sky are much alike. Every tile is an image of an evaluation set;
each of its disguises, and the tile itself, is compared with all of them. Pairs of a tile with another one are the false
ones. Prints a table by threshold, the recall of each disguise, and the CPU time that keys add to validation.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mlmamba.images import open_image
from pipelines.looks import Wanted, all_fields, fields, keys
from pipelines.validate import check_image

TILE, SHOWN = 150, (480, 400)  # pixels of a tile, and what it is enlarged to
THRESHOLDS = (0.65, 0.7, 0.74, 0.76, 0.79, 0.82, 0.85, 0.9)


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    return _saved(image, "JPEG", quality=quality)


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def _cropped(image: Image.Image, right: float, below: float, side: float = 0.9) -> Image.Image:
    width, height = image.width * side, image.height * side
    left, top = (image.width - width) * right, (image.height - height) * below
    return image.crop((round(left), round(top), round(left + width), round(top + height)))


def _titled(image: Image.Image) -> Image.Image:
    image = image.copy()
    font = ImageFont.load_default(size=image.height // 8)
    at = (10, image.height * 0.8)
    ImageDraw.Draw(image).text(at, "SAMPLE TEXT 2024", fill="white", font=font, stroke_width=2, stroke_fill="black")
    return image


DISGUISES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG, quality 30": lambda image: jpeg(image, 30),
    "WebP, quality 50": lambda image: _saved(image, "WEBP", quality=50, method=0),
    "half the size": lambda image: jpeg(_scaled(image, 0.5)),
    "twice the size": lambda image: jpeg(_scaled(image, 2)),
    "cropped by a tenth, centre": lambda image: jpeg(_cropped(image, 0.5, 0.5)),
    "cropped by a tenth, a corner": lambda image: jpeg(_cropped(image, 0, 1)),
    "cropped by a tenth, anywhere": lambda image: jpeg(_cropped(image, 0.27, 0.7)),
    "grey": lambda image: jpeg(ImageOps.grayscale(image)),
    "mirrored": lambda image: jpeg(ImageOps.mirror(image)),
    "with text on it": lambda image: jpeg(_titled(image)),
}


def tiles(folder: Path) -> list[Image.Image]:
    """Parts of the photographs that do not overlap, enlarged to `SHOWN`."""
    found = []
    for file in sorted(folder.iterdir()):
        whole = Image.open(file).convert("RGB")
        for top in range(0, whole.height - TILE + 1, TILE):
            for left in range(0, whole.width - TILE + 1, TILE):
                tile = whole.crop((left, top, left + TILE, top + TILE))
                found.append(tile.resize(SHOWN, Image.Resampling.BICUBIC))
    return found


def alike(asked: list[bytes], wanted: list[bytes]) -> np.ndarray:
    """How much each of n images looks like each of m that are looked for, (n, m)."""
    return np.array([[much for _, _, much in Wanted([one]).find(asked, -1)] for one in wanted]).T


def validation_seconds(encoded: list[bytes], rounds: int = 15) -> tuple[float, float]:
    """CPU seconds to validate the images, without and with their keys: the least of some rounds."""
    least = [float("inf")] * 2
    for _ in range(rounds):
        for i in range(2):
            shown: list[bytes] = []
            seen = (lambda image, shown=shown: shown.append(fields(image))) if i else None
            start = time.process_time()
            for data in encoded:
                check_image(data, seen=seen)
            keys(shown)
            least[i] = min(least[i], time.process_time() - start)
    return least[0], least[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    every = tiles(folder)
    originals = [jpeg(tile) for tile in every]
    reduced = [open_image(data, reduced=True) for data in originals]
    wanted = keys([all_fields(image) for image in reduced])
    kept = [i for i, key in enumerate(wanted) if len(key) == len(max(wanted, key=len))]
    print(f"{len(every)} tiles, {len(every) - len(kept)} without contrast are left out")
    seen = {"itself": keys([fields(reduced[i]) for i in kept])}
    for name, disguise in DISGUISES.items():
        seen[name] = keys([fields(open_image(disguise(every[i]), reduced=True)) for i in kept])
    own, other, lost = {}, [], 0
    different = ~np.eye(len(kept), dtype=bool)
    for name, asked in seen.items():
        lost += asked.count(b"")
        much = alike([key or bytes([1, *[0] * 63]) for key in asked], [wanted[i] for i in kept])
        own[name] = np.diag(much)
        other.append(much[different])
    others = np.concatenate(other)
    found = np.concatenate([own[name] for name in DISGUISES])
    print(f"{len(found):,} disguises ({lost} without contrast), {len(others):,} false pairs\n")
    print("| alike | found | false alarms in 100,000 pairs |\n|---|---|---|")
    for least in THRESHOLDS:
        print(f"| {least:.2f} | {(found >= least).mean():.1%} | {1e5 * (others >= least).mean():.2f} |")
    rare = float(np.sort(others)[-int(len(others) * 1e-5) - 1])
    print(f"\nat {rare:.3f}, one false alarm in 100,000 pairs: {(found > rare).mean():.2%} found\n")
    for name in DISGUISES:
        print(f"| {name} | {(own[name] >= 0.79).mean():.1%} |")
    whole = [Image.open(file).convert("RGB") for file in sorted(folder.iterdir())]
    photographs = [jpeg(image) for image in whole]
    side = np.mean([image.width * image.height for image in whole]) ** 0.5
    plain, keyed = validation_seconds(photographs)
    each = 1e3 / len(photographs)
    print(
        f"\nvalidation of whole photographs (JPEG, {side:.0f} pixels square on average): {plain * each:.2f} ms of CPU"
    )
    print(f"each, with the key {keyed * each:.2f} ms ({keyed / plain - 1:+.1%})")


if __name__ == "__main__":
    main()
