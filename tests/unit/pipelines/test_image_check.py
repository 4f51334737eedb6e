"""The check of an image, which decodes JPEG at an eighth of its size, says what decoding it in full says."""

import random

import pytest
from PIL import Image

from mlmamba.images import ImageError, ImageLimits, open_image
from pipelines.validate import check_image
from tests.helpers.images import encoded


def full(data: bytes) -> str:
    """What decoding in full finds."""
    try:
        open_image(data)
    except ImageError as error:
        return error.reason
    return ""


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut off, with wrong bytes anywhere or in the header, or with a piece missing."""
    data, kind = bytearray(data), rng.randrange(4)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        for _ in range(3):
            data[rng.randrange(min(600, len(data)))] = rng.randrange(256)
    else:
        start = rng.randrange(len(data))
        del data[start : start + rng.randrange(1, 100)]
    return bytes(data)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0, "restart_marker_blocks": 4}, {"mode": "L"}, {"mode": "CMYK"}],
    ids=["baseline", "progressive", "restarts", "grey", "cmyk"],
)
def test_the_verdict_is_that_of_decoding_in_full(options):
    data, rng = encoded(0, "JPEG", (90, 60), blocks=(12, 18), **options), random.Random(str(options))
    assert check_image(data) is None
    seen = set()
    for _ in range(300):
        bad = damaged(data, rng)
        problem = check_image(bad)
        if problem is not None and problem.reason in ("image_format", "image_aspect"):
            continue  # rules of the check alone, and a changed header may break them
        expected = full(bad)
        assert (problem.reason if problem else "") == expected
        seen.add(expected)
    assert {"", "image_truncated", "image_unreadable"} <= seen


def test_the_limit_counts_the_pixels_of_the_file_not_of_the_eighth():
    limits = ImageLimits(max_pixels=5000)
    assert check_image(encoded(0, "JPEG", (90, 60)), limits).reason == "image_bomb"
    assert check_image(encoded(0, "JPEG", (70, 60)), limits) is None


def test_a_turned_image_is_good():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(0, "JPEG", (90, 60), exif=exif)
    assert check_image(data) is None
    assert open_image(data).size == (60, 90)
