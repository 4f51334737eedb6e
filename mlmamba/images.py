"""Decoding images safely. Needs neither torch nor transformers, so preparation workers can afford it."""

import base64
import binascii
import io
import os
import urllib.request
import warnings
from http.client import HTTPException
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 64_000_000


class ImageError(ValueError):
    """An image that cannot be used. `reason` is a short stable code, the message says the details."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an encoded image fully, upright and in RGB.

    Raises:
        ImageError: `image_unreadable` (no image format), `image_bomb` (more than max_pixels) or `image_truncated`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageError("image_bomb", str(error)) from error
    except Exception as error:
        raise ImageError("image_unreadable", f"not an image that Pillow can read ({len(data)} bytes)") from error
    return upright(image, max_pixels)


def upright(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A Pillow image decoded fully, turned as its EXIF orientation says, and in RGB. Raises ImageError."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("image_bomb", f"{width}x{height} pixels, over the limit of {max_pixels}")
    if not width * height:
        raise ImageError("image_unreadable", f"the image is empty: {width}x{height} pixels")
    try:
        image.load()
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, which leaves a white image
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would be copied for nothing
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        reason = "image_truncated" if "truncated" in str(error).lower() else "image_unreadable"
        raise ImageError(reason, f"the image data is damaged: {error}") from error


def as_image(source) -> Image.Image:
    """What a caller may show as an image, upright and in RGB.

    Args:
        source: a Pillow image; encoded bytes; a path; an http(s) URL, which is fetched; a data URI or bare base64; or
            uint8 values (h, w, 3) or (3, h, w) as a numpy array or CPU tensor.

    Raises:
        ImageError: none of these, or one that cannot be used: `image_missing` (no such file, nothing at the URL),
            `image_unreadable`, `image_truncated` or `image_bomb`.
    """
    if isinstance(source, Image.Image):
        return upright(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return open_image(bytes(source))
    if isinstance(source, (str, os.PathLike)):
        return open_image(_read(os.fspath(source)))
    if hasattr(source, "__array__"):
        values = np.asarray(source)
        if values.dtype == np.uint8 and values.ndim == 3 and 3 in (values.shape[0], values.shape[2]) and values.size:
            return Image.fromarray(values if values.shape[2] == 3 else np.ascontiguousarray(values.transpose(1, 2, 0)))
        given = f"{values.dtype} values of shape {values.shape}"
    else:
        given = f"a {type(source).__name__}"
    raise ImageError(
        "image_unreadable",
        f"an image is {given}; expected a Pillow image, encoded bytes, a path, a URL, base64, or uint8 (h, w, 3)",
    )


def _read(source: str) -> bytes:
    """Encoded bytes behind a path, URL, data URI or base64 string."""
    if source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=30) as answer:
                return answer.read()
        except (OSError, HTTPException) as error:
            raise ImageError("image_missing", f"cannot fetch the image at {source}: {error}") from error
    shown = source if len(source) < 100 else f"{source[:60]}... ({len(source)} characters)"
    if source.startswith("data:"):
        source = source.partition(",")[2]
    else:
        try:
            if Path(source).is_file():
                return Path(source).read_bytes()
        except (OSError, ValueError):  # too long for a file name, or with a zero byte
            pass
    try:
        data = base64.b64decode("".join(source.split()), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise ImageError("image_missing", f"there is no image at {shown}: no such file, and not base64")
    return data


def to_pixels(image: Image.Image, size: int) -> np.ndarray:
    """RGB image -> uint8 (3, size, size), resized directly (aspect ignored), as the released ML-Mamba does."""
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1))


def load_pixels(data: bytes, size: int) -> np.ndarray:
    """Encoded image -> uint8 (3, size, size). Raises ImageError."""
    return to_pixels(open_image(data), size)
