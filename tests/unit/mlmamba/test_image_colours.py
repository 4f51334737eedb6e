"""What an image looks like in RGB: transparency on white, deep greys, unusual modes, and the rules of earlier sets."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mlmamba.image_colours import eight_bits, to_rgb
from mlmamba.images import WIDEST, as_image, load_pixels, open_image
from tests.helpers.images import encoded

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def png(depth: int, colour: int, row: bytes, *chunks: tuple[bytes, bytes], width: int = 2) -> bytes:
    """A PNG of one row, with chunks before its data."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def colours(data: bytes, pixels: int = 2) -> list[tuple]:
    """The first row of an encoded image."""
    return [tuple(pixel) for pixel in np.asarray(open_image(data, WIDEST, pixels))[0].tolist()]


def drawing(mode: str) -> Image.Image:
    """A black disc on a transparent ground: in every pixel the colour is black, so the shape is only in alpha."""
    alpha = Image.new("L", (32, 24), 0)
    ImageDraw.Draw(alpha).ellipse((4, 4, 20, 20), fill=255)
    image = Image.merge("LA", (Image.new("L", alpha.size, 0), alpha))
    return image.convert("RGBA").convert("PA" if mode == "PA" else mode)


@pytest.mark.parametrize(
    ("mode", "form"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "TIFF")]
)
def test_a_shape_that_is_only_in_alpha_is_seen(mode, form):
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    pixels = np.asarray(open_image(saved(drawing(mode), form, **options), WIDEST))
    assert set(np.unique(pixels)) == {0, 255}
    assert tuple(pixels[12, 12]) == BLACK
    assert tuple(pixels[0, 0]) == WHITE


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_an_image_of_pillow_is_composited_too(mode):
    source = drawing({"La": "LA", "RGBa": "RGBA"}.get(mode, mode))
    pixels = np.asarray(as_image(source.convert(mode)))
    assert (tuple(pixels[12, 12]), tuple(pixels[0, 0])) == (BLACK, WHITE)


PALETTE = bytes([9, 9, 9, 8, 8, 8, 7, 7, 7, 6, 6, 6])
TRANSPARENT = {
    "palette, alpha of each": (png(8, 3, b"\0\1", (b"PLTE", PALETTE), (b"tRNS", b"\x00\x80")), [WHITE, (131,) * 3]),
    "palette, one colour": (png(2, 3, b"\x40", (b"PLTE", PALETTE), (b"tRNS", b"\xff\0")), [WHITE, (9,) * 3]),
    "grey": (png(8, 0, b"\x10\x20", (b"tRNS", b"\0\x20")), [(16,) * 3, WHITE]),
    "grey, 1 bit": (png(1, 0, b"\x80", (b"tRNS", b"\0\0")), [WHITE, WHITE]),
    "grey, 2 bits": (png(2, 0, b"\x10", (b"tRNS", b"\0\1")), [BLACK, WHITE]),
    "grey, 4 bits": (png(4, 0, b"\x17", (b"tRNS", b"\0\7")), [(17,) * 3, WHITE]),
    "grey, 16 bits": (png(16, 0, b"\x10\x20\x30\x40", (b"tRNS", b"\x30\x40")), [(16,) * 3, WHITE]),
    "colour": (png(8, 2, b"\1\2\3\4\5\6", (b"tRNS", b"\0\4\0\5\0\6")), [(1, 2, 3), WHITE]),
    "colour, 16 bits": (
        png(16, 2, b"\1\xaa\2\xaa\3\xaa\4\xbb\5\xbb\6\xbb", (b"tRNS", b"\4\xbb\5\xbb\6\xbb")),
        [(1, 2, 3), WHITE],
    ),
    "grey and alpha, 16 bits": (png(16, 4, b"\x30\0\0\0\x30\0\xff\xff"), [WHITE, (48,) * 3]),
    "colour and alpha": (png(8, 6, b"\1\2\3\0\1\2\3\xff"), [WHITE, (1, 2, 3)]),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_every_way_that_a_png_is_transparent(kind):
    data, expected = TRANSPARENT[kind]
    assert colours(data) == expected


def test_a_gif_with_a_transparent_colour():
    image = drawing("RGBA").quantize(4)
    data = saved(image, "GIF", transparency=image.getpixel((0, 0)))
    pixels = np.asarray(open_image(data))
    assert (tuple(pixels[12, 12]), tuple(pixels[0, 0])) == (BLACK, WHITE)


def test_half_of_a_colour_is_half_white():
    assert colours(saved(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))) == [(255, 127, 127)]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_an_opaque_image_has_its_own_colours(mode):
    """To the bit, in both versions of the rules: data sets without transparency are what they were."""
    data = encoded(4, mode=mode)
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(stored.convert("RGB"))
    assert (np.asarray(open_image(data)) == expected).all()
    assert (load_pixels(data, 24, 1) == load_pixels(data, 24, 2)).all()


def test_the_rules_of_earlier_data_sets_are_kept():
    assert colours(saved(Image.new("RGBA", (1, 1), (255, 0, 0, 0))), pixels=1) == [(255, 0, 0)]
    assert colours(saved(Image.fromarray(np.full((1, 1), 3000, np.uint16))), pixels=1) == [(11, 11, 11)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 4095], [0, 255]),  # a scanner's 12 bits
        ([0, 2048, 4000], [0, 128, 250]),
        ([0, 4096], [0, 16]),
        ([0, 65535], [0, 255]),
        ([3, 255], [3, 255]),  # 8 bits in a 16-bit file
    ],
)
def test_grey_values_are_scaled_by_the_bits_that_hold_them(values, expected):
    deep = np.array([values], np.uint16)
    assert [red for red, *_ in colours(saved(Image.fromarray(deep)))] == expected
    assert [red for red, *_ in colours(saved(Image.fromarray(deep), "TIFF"))] == expected
    assert eight_bits(deep.astype(np.int32)).tolist() == [expected]  # Pillow's mode I
    assert np.abs(eight_bits(deep.astype(np.float32)).astype(int) - expected).max() <= 1  # and F


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 1e6], [0, 255]),
        ([np.nan, 0.0, 1.0], [0, 0, 255]),
        ([np.inf, 0.0, 1.0], [255, 0, 255]),
        ([-7.0, -7.0], [0, 0]),
    ],
)
def test_fractions_and_other_ranges(values, expected):
    floats = np.array([values], np.float32)
    assert eight_bits(floats).tolist() == [expected]
    assert [red for red, *_ in colours(saved(Image.fromarray(floats), "TIFF"))] == expected


def test_integers_of_32_bits_are_stretched():
    assert eight_bits(np.array([[-500, 0, 500]], np.int32)).tolist() == [[0, 128, 255]]
    assert eight_bits(np.array([[0, 1 << 30]], np.int32)).tolist() == [[0, 255]]


def test_an_image_of_no_numbers_is_an_error():
    with pytest.raises(ValueError, match="no value of the image is a number"):
        eight_bits(np.full((2, 2), np.nan, np.float32))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colour_spaces(mode):
    image = Image.new("RGB", (4, 4), (200, 60, 90))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        image = image.convert(mode)
    assert np.abs(np.array(to_rgb(image).getpixel((1, 1))) - (200, 60, 90)).max() <= 3
    if mode != "YCbCr":
        assert np.abs(np.array(colours(saved(image, "TIFF"))[0]) - (200, 60, 90)).max() <= 3


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert open_image(data).getpixel((3, 3)) == (255, 0, 0)
