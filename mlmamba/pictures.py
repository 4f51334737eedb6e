"""Decoding pictures safely. Needs neither torch nor transformers, so preparation workers can afford it."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000


class PictureError(ValueError):
    """A picture that cannot be used. `reason` is a short stable code, the message says the details."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an encoded picture fully, upright and in RGB.

    Raises:
        PictureError: `image_unreadable` (no picture format), `image_bomb` (more than max_pixels) or `image_truncated`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise PictureError("image_bomb", str(error)) from error
    except Exception as error:
        raise PictureError("image_unreadable", f"not a picture that Pillow can read ({len(data)} bytes)") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise PictureError("image_bomb", f"{width}x{height} pixels, over the limit of {max_pixels}")
    try:
        picture.load()
        if picture.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, which leaves a white picture
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:
        reason = "image_truncated" if "truncated" in str(error).lower() else "image_unreadable"
        raise PictureError(reason, f"the picture data is damaged: {error}") from error


def to_pixels(picture: Image.Image, size: int) -> np.ndarray:
    """RGB picture -> uint8 (3, size, size), resized directly (aspect ignored), as the released ML-Mamba does."""
    resized = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1))


def load_pixels(data: bytes, size: int) -> np.ndarray:
    """Encoded picture -> uint8 (3, size, size). Raises PictureError."""
    return to_pixels(open_picture(data), size)
