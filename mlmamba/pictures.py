"""Decoding pictures safely. Needs neither torch nor transformers, so preparation workers can afford it."""

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
    return upright(picture, max_pixels)


def upright(picture: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A Pillow picture decoded fully, turned as its EXIF orientation says, and in RGB. Raises PictureError."""
    width, height = picture.size
    if width * height > max_pixels:
        raise PictureError("image_bomb", f"{width}x{height} pixels, over the limit of {max_pixels}")
    if not width * height:
        raise PictureError("image_unreadable", f"the picture is empty: {width}x{height} pixels")
    try:
        picture.load()
        if picture.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, which leaves a white picture
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would be copied for nothing
            picture = ImageOps.exif_transpose(picture)
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except Exception as error:
        reason = "image_truncated" if "truncated" in str(error).lower() else "image_unreadable"
        raise PictureError(reason, f"the picture data is damaged: {error}") from error


def as_picture(source) -> Image.Image:
    """What a caller may show as a picture, upright and in RGB.

    Args:
        source: a Pillow picture; encoded bytes; a path; an http(s) URL, which is fetched; a data URI or bare base64; or
            uint8 values (h, w, 3) or (3, h, w) as a numpy array or CPU tensor.

    Raises:
        PictureError: none of these, or one that cannot be used: `image_missing` (no such file, nothing at the URL),
            `image_unreadable`, `image_truncated` or `image_bomb`.
    """
    if isinstance(source, Image.Image):
        return upright(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return open_picture(bytes(source))
    if isinstance(source, (str, os.PathLike)):
        return open_picture(_read(os.fspath(source)))
    if hasattr(source, "__array__"):
        values = np.asarray(source)
        if values.dtype == np.uint8 and values.ndim == 3 and 3 in (values.shape[0], values.shape[2]) and values.size:
            return Image.fromarray(values if values.shape[2] == 3 else np.ascontiguousarray(values.transpose(1, 2, 0)))
        given = f"{values.dtype} values of shape {values.shape}"
    else:
        given = f"a {type(source).__name__}"
    raise PictureError(
        "image_unreadable",
        f"a picture is {given}; expected a Pillow picture, encoded bytes, a path, a URL, base64, or uint8 (h, w, 3)",
    )


def _read(source: str) -> bytes:
    """Encoded bytes behind a path, URL, data URI or base64 string."""
    if source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=30) as answer:
                return answer.read()
        except (OSError, HTTPException) as error:
            raise PictureError("image_missing", f"cannot fetch the picture at {source}: {error}") from error
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
        raise PictureError("image_missing", f"there is no picture at {shown}: no such file, and not base64")
    return data


def to_pixels(picture: Image.Image, size: int) -> np.ndarray:
    """RGB picture -> uint8 (3, size, size), resized directly (aspect ignored), as the released ML-Mamba does."""
    resized = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1))


def load_pixels(data: bytes, size: int) -> np.ndarray:
    """Encoded picture -> uint8 (3, size, size). Raises PictureError."""
    return to_pixels(open_picture(data), size)
