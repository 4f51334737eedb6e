"""Decoding images: whatever bytes come in, either an upright RGB image comes out or an error with its reason."""

import base64
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from mlmamba import images
from mlmamba.images import KNOWN_FORMATS, ImageError, ImageLimits, as_image, load_pixels, open_image, to_pixels

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def two_halves(width: int = 8, height: int = 4) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def reason_of(data: bytes, **limits) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(data, ImageLimits(**limits))
    return caught.value.reason


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_common_formats_open_in_rgb(form):
    image = open_image(encode(Image.new("RGB", (9, 5), (200, 100, 50)), form))
    assert (image.mode, image.size) == ("RGB", (9, 5))
    assert np.abs(np.asarray(image).astype(int) - (200, 100, 50)).max() <= 12


@pytest.mark.parametrize("data", [b"", b"no image at all", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_image_is_unreadable(data):
    assert reason_of(data) == "image_unreadable"


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_truncated_image_is_an_error(form):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, form)
    assert reason_of(data[: len(data) // 2]) == "image_truncated"


def test_too_many_pixels_are_refused_before_decoding():
    data = encode(Image.new("RGB", (100, 50)))
    assert open_image(data, ImageLimits(max_pixels=5000)).size == (100, 50)
    assert reason_of(data, max_pixels=4999) == "image_bomb"
    truncated = data[:60]
    assert reason_of(truncated, max_pixels=4999) == "image_bomb"


@pytest.mark.filterwarnings("error")
def test_a_real_bomb_has_the_same_reason():
    """Over twice its own limit Pillow raises before we can look at the size; below it warns."""
    assert reason_of(encode(Image.new("1", (20_000, 10_000)))) == "image_bomb"
    assert reason_of(encode(Image.new("1", (10_000, 10_000)))) == "image_bomb"


@pytest.mark.parametrize(
    ("orientation", "first_row"),
    [(1, [RED, BLUE]), (2, [BLUE, RED]), (3, [BLUE, RED]), (6, [RED, RED]), (8, [BLUE, BLUE])],
)
def test_the_exif_orientation_is_applied(orientation, first_row):
    image = two_halves()
    exif = image.getexif()
    exif[0x0112] = orientation
    upright = open_image(encode(image, exif=exif))
    assert upright.size == ((8, 4) if orientation < 5 else (4, 8))
    assert [upright.getpixel((0, 0)), upright.getpixel((upright.width - 1, 0))] == first_row


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    form = "TIFF" if mode == "CMYK" else "PNG"
    image = open_image(
        encode(Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode), form), ImageLimits(KNOWN_FORMATS)
    )
    assert image.mode == "RGB"
    assert (np.asarray(image) == 255).all()


def test_a_palette_keeps_its_colours():
    palette = two_halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    assert palette.mode == "P"
    opened = open_image(encode(palette))
    assert (opened.getpixel((0, 0)), opened.getpixel((7, 0))) == (RED, BLUE)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    opened = np.asarray(open_image(encode(Image.fromarray(ramp))))
    assert (opened == (ramp >> 8)[..., None]).all()


def test_pixels_are_channels_first_and_square():
    pixels = to_pixels(two_halves(8, 8), 8)
    assert (pixels.dtype, pixels.shape, pixels.flags.c_contiguous) == (np.uint8, (3, 8, 8), True)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert pixels[:, 0, 7].tolist() == [0, 0, 255]


def test_the_aspect_is_ignored():
    assert to_pixels(two_halves(64, 4), 16).shape == (3, 16, 16)


@pytest.mark.parametrize("size", [(640, 480), (101, 67), (400, 20), (9, 5), (1, 1), (2, 2)])
@pytest.mark.parametrize("side", [16, 64, 224])
def test_the_resize_is_that_of_earlier_sets_but_for_rounding(size, side):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    now, before = (to_pixels(image, side, version).astype(int) for version in (3, 2))
    assert np.abs(now - before).max() <= 2
    assert (now != before).mean() <= 1 / 40


@pytest.mark.parametrize("size", [(640, 480), (1500, 1100), (3, 2000), (2000, 3), (64, 900)])
@pytest.mark.parametrize("strip", [1, 64 * 50, 2**20])
def test_an_image_in_strips_is_resized_as_it_is_whole(size, strip, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    values = torch.from_numpy(noise).permute(2, 0, 1)[None]
    whole = torch.nn.functional.interpolate(values, size=(64, 64), mode="bicubic", antialias=True)[0]
    monkeypatch.setattr(images, "_STRIP_PIXELS", strip)
    assert (to_pixels(Image.fromarray(noise), 64) == whole.numpy()).all()


def test_an_image_of_the_right_size_is_not_touched_by_the_resize():
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert (to_pixels(Image.fromarray(noise), 48) == noise.transpose(2, 0, 1)).all()


def test_a_set_keeps_the_resize_that_it_was_prepared_under():
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)))
    one, two = (load_pixels(data, 24, version) for version in (2, 3))
    assert (one != two).any()
    assert (one == to_pixels(open_image(data), 24, 2)).all()


def test_bytes_become_pixels_in_one_call():
    assert (load_pixels(encode(two_halves()), 8) == to_pixels(two_halves(), 8)).all()
    with pytest.raises(ImageError):
        load_pixels(b"nothing", 8)


def test_an_image_of_pillow_is_turned_and_scaled_as_its_file_would_be():
    image = two_halves()
    exif = image.getexif()
    exif[0x0112] = 3
    turned = Image.open(io.BytesIO(encode(image, exif=exif)))
    assert as_image(turned).getpixel((0, 0)) == BLUE
    deep = Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))
    assert as_image(deep).getpixel((0, 0)) == (40_000 >> 8,) * 3


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,"])
def test_base64_is_read_with_and_without_its_prefix(prefix):
    text = base64.encodebytes(encode(two_halves())).decode()  # with line breaks
    assert (np.asarray(as_image(prefix + text)) == np.asarray(two_halves())).all()


def test_values_are_taken_with_channels_first_or_last():
    values = np.asarray(two_halves())
    for form in (values, values.transpose(2, 0, 1)):
        assert (np.asarray(as_image(form)) == values).all()


@pytest.mark.parametrize("source", ["/no/such/image.png", "no such file", "x" * 5000, "zero\0byte", ""])
def test_what_is_neither_file_nor_base64_is_missing(source):
    with pytest.raises(ImageError) as caught:
        as_image(source)
    assert caught.value.reason in ("image_missing", "image_unreadable")
    assert len(str(caught.value)) < 200


def webp_canvas(side: int) -> bytes:
    """A WebP of a hundred bytes: an animation whose one frame is 2 x 2 on a canvas of side x side pixels."""
    frames = [Image.new("RGB", (2, 2), RED), Image.new("RGB", (2, 2), BLUE)]
    data = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    data[24:30] = (side - 1).to_bytes(3, "little") * 2
    return bytes(data)


def gif_canvas(side: int) -> bytes:
    data = bytearray(encode(Image.new("P", (2, 2)), "GIF"))
    data[6:10] = side.to_bytes(2, "little") * 2
    return bytes(data)


def png_canvas(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("make", [webp_canvas, gif_canvas, png_canvas])
@pytest.mark.parametrize("side", [8000, 16_383, 65_535])
def test_a_small_file_with_an_enormous_canvas_is_a_bomb(make, side):
    """8000 x 8000 pixels are within the limit, but not in a hundred bytes. Nothing is decoded to find it out."""
    data = make(side)
    assert len(data) < 200
    assert reason_of(data) == "image_bomb"


def test_a_large_image_of_one_colour_is_none():
    assert open_image(encode(Image.new("1", (5000, 5000)))).size == (5000, 5000)


def test_a_jpeg_of_a_thousand_passes_is_a_bomb():
    data = encode(two_halves(64, 64), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    assert open_image(data[:-2] + data[scan:-2] * 20 + data[-2:]).size == (64, 64)
    assert reason_of(data[:-2] + data[scan:-2] * 1000 + data[-2:]) == "image_bomb"


def test_a_stripe_is_refused_by_its_aspect():
    assert reason_of(encode(Image.new("RGB", (210, 10)))) == "image_aspect"
    with pytest.raises(ImageError, match="210 x 10 pixels, at most 20:1 is allowed"):
        as_image(Image.new("RGB", (210, 10)))
    assert load_pixels(encode(Image.new("RGB", (210, 10))), 4).shape == (3, 4, 4)  # of a set that somebody has made


def test_a_turned_image_that_comes_through_twice_is_turned_once():
    image = two_halves()
    exif = image.getexif()
    exif[0x0112] = 3
    once = open_image(encode(image, exif=exif))
    assert as_image(once).getpixel((0, 0)) == once.getpixel((0, 0)) == BLUE


def test_formats_are_a_limit():
    data = encode(two_halves(), "GIF")
    assert reason_of(data, formats=("PNG", "JPEG")) == "image_format"
    assert open_image(data, ImageLimits(("GIF",))).size == (8, 4)


def test_many_threads_at_once():
    """What one thread decodes does not change what Pillow's global switches say to another."""
    cases = [encode(two_halves(), "PNG"), b"nothing", png_canvas(9000), encode(two_halves())[:60]]

    def outcome(data: bytes) -> str:
        try:
            return str(np.asarray(open_image(data)).sum())
        except ImageError as error:
            return str(error)

    expected = [outcome(data) for data in cases]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, cases * 100)) == expected * 100
