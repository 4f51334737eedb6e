"""The gate for images: whatever comes in, an upright RGB image comes out, or an error with its reason.

Preparation, training, evaluation, chat, serving and the processor all take their images through here, so that what one
accepts the others can read, and all see the same pixels (mlmamba/image_colours.py has the rules of colour). Needs
neither torch nor transformers but for a resize, so preparation workers can afford it. Changes nothing global: it runs
in many threads.
"""

import base64
import binascii
import io
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from mlmamba.image_colours import PIXELS, to_rgb
from mlmamba.image_files import OPENERS, declared_size, describe, format_of, other_image, without_metadata

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF")
"""Accepted unless a recipe says otherwise. MPO: JPEG as some cameras write it; the first image counts."""
KNOWN_FORMATS = (*FORMATS, "TIFF")
"""What a recipe may accept."""
MAX_PIXELS = 64_000_000
MOST_PIXELS = 178_000_000
"""The largest limit that a recipe may set. Some of Pillow's readers refuse more, whatever they are told."""
MAX_ASPECT = 20.0
"""Beyond this a square resize leaves stripes."""

_EMPTY_FROM = 16_000_000
_MOST_PER_BYTE = 10_000
_MOST_SCANS = 100
_MOST_BYTES = 256 << 20
_STRIP_PIXELS = 2**20
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used. `reason` is a short stable code, the message says the details."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ImageLimits:
    """What the gate lets through."""

    formats: tuple[str, ...] = FORMATS
    """Of KNOWN_FORMATS."""
    max_pixels: int = MAX_PIXELS
    """By the size that the file declares, before anything is decoded."""
    max_aspect: float = MAX_ASPECT
    """The longer side over the shorter."""

    def check_size(self, width: int, height: int) -> None:
        """Raise ImageError when an image of so many pixels is not let through."""
        if not width * height:
            raise ImageError("image_unreadable", f"the image is empty: {width} x {height} pixels")
        if max(width, height) > self.max_aspect * min(width, height):
            raise ImageError("image_aspect", f"{width} x {height} pixels, at most {self.max_aspect:g}:1 is allowed")
        if width * height > self.max_pixels:
            raise ImageError("image_bomb", f"{width} x {height} pixels, over the limit of {self.max_pixels}")


LIMITS = ImageLimits()
"""For images from outside: those of chats and requests, and of a recipe that sets no limits."""
WIDEST = ImageLimits(KNOWN_FORMATS, MOST_PIXELS, float("inf"))
"""For images that somebody has chosen: those of a finished data set, and test sets, where an image left out would
change the score."""


def open_image(data: bytes, limits: ImageLimits = LIMITS, pixels: int = PIXELS, reduced: bool = False) -> Image.Image:
    """Decode an encoded image fully, upright and in RGB.

    Metadata never decides: where a text, a colour profile or EXIF is damaged or too large, the image is read without.

    Args:
        data: the file's content.
        limits: what is let through.
        pixels: version of the rules of colour (mlmamba/image_colours.py).
        reduced: give a JPEG at an eighth of its size, for a check in half the time. Its data is read to the end.

    Raises:
        ImageError: `image_unreadable` (no image, or damaged), `image_format` (a format that `limits` lacks),
            `image_aspect`, `image_bomb` (too many pixels, or a small file that takes the memory of a large image) or
            `image_truncated`.
    """
    problem = None
    for image in _openings(data, limits):
        if reduced:
            image.draft(None, (1, 1))
        try:
            return _upright(image, pixels)
        except ImageError as error:
            problem = error
    raise problem


def image_size(data: bytes, limits: ImageLimits = LIMITS) -> tuple[int, int]:
    """Width and height that an encoded image declares, before it is turned upright. Nothing is decoded.

    Raises:
        ImageError: as `open_image`, as far as its header tells.
    """
    return next(_openings(data, limits)).size


def _openings(data: bytes, limits: ImageLimits) -> Iterator[Image.Image]:
    """The image opened and let through, its pixels not read; then once more without its metadata, should those fail."""
    kind = format_of(data)
    if kind is None or kind not in limits.formats:
        raise _not_accepted(kind or other_image(data), data, limits)
    if kind == "JPEG" and (scans := data.count(b"\xff\xda")) > _MOST_SCANS:  # each is a pass over all pixels
        raise ImageError("image_bomb", f"a JPEG of {scans} scans, at most {_MOST_SCANS} are read")
    if size := declared_size(kind, data):
        _check_size(size, data, limits)
    problem = None
    for content in chain([data], without_metadata(kind, data)):
        try:
            image = OPENERS[kind](io.BytesIO(content))
        except Exception as error:
            problem = ImageError("image_unreadable", f"the {kind} data is damaged: {_text(error)}")
            problem.__cause__ = error
            continue
        _check_size(image.size, data, limits)
        problem = None
        yield image
    if problem:
        raise problem


def upright(image: Image.Image, limits: ImageLimits = LIMITS) -> Image.Image:
    """A Pillow image decoded fully, turned as its EXIF orientation says, and in RGB. Raises ImageError."""
    limits.check_size(*image.size)
    return _upright(image, PIXELS)


def _upright(image: Image.Image, pixels: int) -> Image.Image:
    try:
        colours = to_rgb(image, pixels)
    except Exception as error:
        if "truncated" in str(error).lower():
            raise ImageError("image_truncated", f"the image ends before its data does: {_text(error)}") from error
        raise ImageError("image_unreadable", f"the image data is damaged: {_text(error)}") from error
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF says nothing about the pixels
        turn = None
    if turn is None:
        return colours
    colours = colours.transpose(turn)
    colours.info = {}  # else it would be turned again when it comes through here again
    return colours


def _check_size(size: tuple[int, int], data: bytes, limits: ImageLimits) -> None:
    limits.check_size(*size)
    if size[0] * size[1] > max(_EMPTY_FROM, _MOST_PER_BYTE * len(data)):
        raise ImageError(
            "image_bomb",
            f"{size[0]} x {size[1]} pixels in {len(data)} bytes: such an image shows nothing and takes much memory",
        )


def _not_accepted(kind: str | None, data: bytes, limits: ImageLimits) -> ImageError:
    if kind is None:
        return ImageError("image_unreadable", f"not an image but {describe(data)}")
    accepted = ", ".join(limits.formats)
    return ImageError("image_format", f"{kind} is none of the accepted formats ({accepted}): convert it to PNG or JPEG")


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def as_image(source) -> Image.Image:
    """What a caller may show as an image, upright and in RGB.

    Args:
        source: a Pillow image; encoded bytes; a path; an http(s) URL, which is fetched; a data URI or bare base64; or
            uint8 values (h, w, 3) or (3, h, w) as a numpy array or CPU tensor.

    Raises:
        ImageError: none of these, or one that cannot be used: `image_missing` (no such file, nothing at the URL), or
            as `open_image`.
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
            last = values if values.shape[2] == 3 else np.ascontiguousarray(values.transpose(1, 2, 0))
            return upright(Image.fromarray(last))
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
                data = answer.read(_MOST_BYTES + 1)
        except (OSError, HTTPException) as error:
            raise ImageError("image_missing", f"cannot fetch the image at {source}: {error}") from error
        if len(data) > _MOST_BYTES:  # perhaps it never ends
            raise ImageError("image_bomb", f"the image at {source} has over {_MOST_BYTES} bytes")
        return data
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


def to_pixels(image: Image.Image, size: int | tuple[int, int], pixels: int = PIXELS) -> np.ndarray:
    """RGB image -> uint8 (3, h, w), resized directly (aspect ignored), as the released ML-Mamba does.

    Args:
        image: of any size.
        size: side of the result, or its height and width.
        pixels: version of the rules. From 3 on by torch, in a fifth of the time that Pillow takes. The values are those
            of Pillow 11, with which the released model was trained, but for the rounding of a few: noise of any size
            has at most one value in 40 that differs, by 1 or 2 of 255. Pillow 13 rounds tall images in another way.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if pixels < 3:
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1))
    import torch  # here, because preparation does not resize, and its workers can do without
    from torch.nn.functional import interpolate

    def values(strip: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(strip)).permute(2, 0, 1)[None]

    resize = partial(interpolate, mode="bicubic", antialias=True)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if image.width * image.height <= _STRIP_PIXELS:
        return resize(values(image), (height, width))[0].contiguous().numpy()
    # Rows are independent until the columns are resized. In strips of them, a large image is not held a second time.
    narrow = torch.empty(1, 3, image.height, width, dtype=torch.uint8)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = values(image.crop((0, top, image.width, min(top + rows, image.height))))
        narrow[:, :, top : top + rows] = resize(strip, (strip.shape[2], width))
    return resize(narrow, (height, width))[0].contiguous().numpy()


def load_pixels(data: bytes, size: int, pixels: int = PIXELS) -> np.ndarray:
    """Encoded image of a data set or test set -> uint8 (3, size, size). Raises ImageError.

    Args:
        data: the file's content.
        size: side of the result.
        pixels: version of the rules of colour: the one in the data set's manifest.
    """
    return to_pixels(open_image(data, WIDEST, pixels), size, pixels)
