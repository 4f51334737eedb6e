"""Images for tests: a few large blocks of random colours, as PIL images or encoded.

Noise would be all alike to an encoder, and one colour is lost in a JPEG's rounding: blocks differ in what a model sees
as well as in their bytes.
"""

import io

import numpy as np
from PIL import Image


def image(seed: int = 0, size: tuple[int, int] = (40, 30), blocks: tuple[int, int] = (2, 2)) -> Image.Image:
    """An RGB image.

    Args:
        seed: another seed is another image.
        size: (width, height) in pixels.
        blocks: how many blocks, down and across.
    """
    pixels = np.random.default_rng(seed).integers(0, 255, (*blocks, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def encoded(
    seed: int = 0,
    kind: str = "PNG",
    size: tuple[int, int] = (40, 30),
    mode: str = "RGB",
    blocks: tuple[int, int] = (2, 2),
    **options,
) -> bytes:
    """The bytes of a file with `image(seed, size, blocks)` in it.

    Args:
        kind: PIL's name of the format.
        mode: PIL's name of the colour mode.
        options: what PIL's encoder of that format takes.
    """
    buffer = io.BytesIO()
    image(seed, size, blocks).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def scene(seed: int) -> Image.Image:
    """Light and dark spots of many sizes, as photographs have them."""
    rng, pixels = np.random.default_rng(seed), np.zeros((384, 512, 3))
    for size in (3, 6, 12, 24):
        spots = Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8))
        pixels += np.asarray(spots.resize((512, 384), Image.Resampling.BICUBIC), dtype=float) / size**0.7
    return Image.fromarray((255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.uint8))
