"""The pixels of a decoded image in 8-bit RGB, whatever mode it is stored in. These are the rules:

- What is transparent is composited on white, by an alpha channel, a palette's alpha or one transparent colour.
- Grey values of more than 8 bits are divided so that the smallest of 8, 12 and 16 bits that holds the largest value of
  the image becomes 0..255: a scanner's 12 bits in a 16-bit file are not black. Fractions from 0 to 1 become 0..255.
  Other ranges (below 0, over 16 bits) are stretched from their least to their largest value; NaN is black.
- CMYK, YCbCr, HSV and LAB by Pillow's formulas, without the file's colour profile; a palette by its colours; 1 bit
  becomes black and white. Of an animation, the first frame counts.

`PIXELS` is the version of these rules and of the resize (`images.to_pixels`). Data sets carry it in their manifest, so
that training reads a set by the rules that it was prepared under.
"""

import numpy as np
from PIL import Image

PIXELS = 3
"""1: transparency was dropped, which showed the colour that lies under it, and 16 bits were divided by 256.
2: images were resized by Pillow."""

_BITS = (8, 12, 16)


def to_rgb(image: Image.Image, version: int = PIXELS) -> Image.Image:
    """An image in RGB, loaded. The image itself where it is RGB already.

    Args:
        image: of any of Pillow's modes.
        version: of the rules.

    Raises:
        Exception: whatever Pillow raises on data that it cannot decode.
    """
    key = _transparent_colour(image)
    image.load()
    if version < 2:
        return _to_rgb_before(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = Image.fromarray(eight_bits(values)).convert("RGB")
        if not isinstance(key, int):
            return grey
        return _on_white(grey, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if key != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = key
    layers = image if image.mode == "RGBA" else image.convert("RGBA")
    return _on_white(layers, layers.getchannel("A"))


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits as uint8 of the same shape, by the rules above. Raises ValueError: no numbers."""
    if values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        if low >= 0 and high < 1 << _BITS[-1]:
            bits = next(bits for bits in _BITS if high < 1 << bits)
            return (values >> (bits - 8)).astype(np.uint8)
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        raise ValueError("no value of the image is a number")
    low, high = finite.min(), finite.max()
    if low < 0 or high >= 1 << _BITS[-1]:
        shift, scale = low, 255 / (high - low) if high > low else 0.0
    elif high <= 1:
        shift, scale = 0.0, 255.0
    else:
        shift, scale = 0.0, 256 / next(1 << bits for bits in _BITS if high < 1 << bits)
    known = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    scaled = np.clip((known - shift) * scale, 0, 255)
    return np.where(np.isnan(values), 0, scaled).round().astype(np.uint8)


def _on_white(colours: Image.Image, alpha: Image.Image) -> Image.Image:
    if alpha.getextrema()[0] == 255:  # opaque throughout
        return colours if colours.mode == "RGB" else colours.convert("RGB")
    ground = Image.new("RGB", colours.size, "white")
    ground.paste(colours, mask=alpha)
    return ground


def _transparent_colour(image: Image.Image):
    """The image's one transparent colour as its decoded pixels have it: Pillow leaves a PNG's as it is in the file."""
    key, stored = image.info.get("transparency"), tiles[0][3] if (tiles := getattr(image, "tile", None)) else None
    if isinstance(key, int) and stored in ("L;2", "L;4"):
        return key * (85 if stored == "L;2" else 17)
    if isinstance(key, tuple) and stored == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return key


def _to_rgb_before(image: Image.Image) -> Image.Image:
    """By version 1 of the rules."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
