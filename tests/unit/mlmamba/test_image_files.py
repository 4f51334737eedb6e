"""Which format bytes are, how a person is told what they are instead, and that metadata never decides."""

import io
import json
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mlmamba.image_files import describe, format_of, other_image
from mlmamba.images import ImageError, open_image
from tests.helpers.images import encoded, image

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NO_IMAGES = {
    "a Git LFS pointer": (LFS, "a Git LFS pointer, not the file that it stands for: run git lfs pull"),
    "an empty file": (b"", "an empty file"),
    "zeros": (bytes(500), "500 zero bytes"),
    "html": (b"<!DOCTYPE html>\n<html><title>Sign in</title>", "an HTML page"),
    "html after a comment": (b"\xef\xbb\xbf <!-- x --><HTML><body>404", "an HTML page"),
    "a store's error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "a server's error": (json.dumps({"error": "not found"}).encode(), "JSON, such as a server's error: '{\"error\":"),
    "text": (b"there is no such image", "text: 'there is no such image'"),
    "text like a bitmap": (b"BMW makes cars", "text: 'BMW makes cars'"),
    "pdf": (b"%PDF-1.7 ...", "a PDF document"),
    "zip": (b"PK\x03\x04....", "a zip archive"),
    "mp4": (b"\0\0\0\x18ftypisom....", "a video (MP4"),
    "noise": (b"\x01\x02\x80\xff" * 9, "36 bytes of no known format"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_image_is_named(kind):
    data, name = NO_IMAGES[kind]
    assert describe(data).startswith(name)
    with pytest.raises(ImageError, match="not an image but ") as caught:
        open_image(data)
    assert caught.value.reason == "image_unreadable"
    assert len(str(caught.value)) < 200


OTHER_IMAGES = {
    "SVG": b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "AVIF": b"\0\0\0\x20ftypavif\0\0\0\0",
    "HEIC": b"\0\0\0\x20ftypheic\0\0\0\0",
    "EPS or PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "PPM": b"P6 1 1 255\nabc",
    "DICOM": bytes(128) + b"DICM",
    "TIFF": encoded(kind="TIFF"),
}


@pytest.mark.parametrize("name", OTHER_IMAGES)
def test_images_of_other_formats_are_named(name):
    assert (format_of(OTHER_IMAGES[name]) or other_image(OTHER_IMAGES[name])) == name
    with pytest.raises(ImageError, match=f"^{name} is none of the accepted formats .*: convert it to PNG") as caught:
        open_image(OTHER_IMAGES[name])
    assert caught.value.reason == "image_format"


@pytest.mark.parametrize(
    "data", [b"<!---->" * 600, b"<?x>" * 1000, b"<!-- " * 5000, b"[" * 1_000_000, b" " * 2_000_000]
)
def test_describing_ends_on_input_made_for_it(data):
    """Patterns that try every split of a text would take years on these."""
    assert other_image(data) is None
    assert len(describe(data)) < 200


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(added: bytes, before: bytes = b"IDAT") -> bytes:
    data = encoded(3)
    at = data.index(before) - 4
    return data[:at] + added + data[at:]


def exif(orientation: int = 1) -> bytes:
    held = Image.Exif()
    held[0x0112] = orientation
    return held.tobytes()


DAMAGED_CRC = chunk(b"tEXt", b"Comment\0hello")[:-1] + b"\0"
PNG_METADATA = {
    "a text of 4 MB": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(4 << 20))),
    "a large international text": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(4 << 20))),
    "70 MB of texts": chunk(b"tEXt", b"Comment\0" + b"x" * 1_000_000) * 70,
    "a text with a wrong checksum": DAMAGED_CRC,
    "a text that is not compressed": chunk(b"zTXt", b"Comment\0\0no zlib"),
    "a text of an unknown compression": chunk(b"zTXt", b"Comment\0\7abc"),
    "a colour profile of 4 MB": chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(4 << 20))),
    "a colour profile that is none": chunk(b"iCCP", b"icc\0\7abc"),
    "short physical sizes": chunk(b"pHYs", b"\0\0"),
    "an empty sRGB": chunk(b"sRGB", b""),
    "short chromaticities": chunk(b"cHRM", b"\0\0\0"),
    "an animation without frames": chunk(b"acTL", struct.pack(">II", 0, 0)),
    "an animation that is cut off": chunk(b"acTL", b"\0"),
    "damaged EXIF": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "EXIF that is none": chunk(b"eXIf", b"nothing"),
}


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("kind", PNG_METADATA)
def test_metadata_of_a_png_does_not_matter(kind, before):
    pixels = np.asarray(open_image(with_chunk(PNG_METADATA[kind], before)))
    assert (pixels == np.asarray(image(3))).all()


def test_damaged_metadata_does_not_take_the_orientation_with_it():
    data = encoded(3, exif=exif(6))
    at = data.index(b"IDAT") - 4
    turned = open_image(data[:at] + DAMAGED_CRC + data[at:])
    assert (np.asarray(turned) == np.asarray(image(3).transpose(Image.Transpose.ROTATE_270))).all()


def test_damage_of_the_pixels_is_still_found():
    data = bytearray(with_chunk(DAMAGED_CRC))
    data[data.index(b"IDAT") + 30] ^= 1
    with pytest.raises(ImageError) as caught:
        open_image(bytes(data))
    assert caught.value.reason == "image_unreadable"


def segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


JPEG_METADATA = {
    "a short colour profile": segment(0xE2, b"ICC_PROFILE\0"),
    "colour profiles out of order": segment(0xE2, b"ICC_PROFILE\0\5\2abc") + segment(0xE2, b"ICC_PROFILE\0\5\2abc"),
    "a short JFIF": segment(0xE0, b"JFIF"),
    "a short Adobe": segment(0xEE, b"Adobe"),
    "damaged EXIF": segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "EXIF that points into itself": segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\4\0\1\0\0\0\x08\0\0\0"),
    "an orientation that is text": segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\2\0\2\0\0\0a\0\0\0\0\0\0\0"),
    "Photoshop's, cut off": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\xff\xff\xff\xff"),
    "a table of several images that is none": segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    "a comment of 60 kB": segment(0xFE, b"x" * 60_000),
}


@pytest.mark.parametrize("kind", JPEG_METADATA)
def test_metadata_of_a_jpeg_does_not_matter(kind):
    data = encoded(3, "JPEG")
    assert (np.asarray(open_image(data[:2] + JPEG_METADATA[kind] + data[2:])) == np.asarray(open_image(data))).all()


@pytest.mark.parametrize("kind", ["EXIF", "XMP ", "ICCP", "junk"])
def test_metadata_of_a_webp_does_not_matter(kind):
    lossless = {"lossless": True}
    data = encoded(3, "WEBP", exif=exif(), icc_profile=b"x" * 50, xmp=b"<x/>", **lossless)
    expected = np.asarray(image(3))
    assert (np.asarray(open_image(data)) == expected).all()
    if kind == "junk":
        damaged = data + b"JUNK\xff\xff\xff\x7f"
    else:
        at = data.index(kind.encode())
        damaged = data[: at + 4] + b"\xff\xff\xff\x7f" + data[at + 8 :] if kind == "XMP " else None
        damaged = damaged or data[: at + 8] + bytes(len(data[at + 8 : at + 20])) + data[at + 20 :]
    assert (np.asarray(open_image(damaged)) == expected).all()
    cut = data[: data.index(b"XMP ") + 6]  # the file ends within its metadata
    assert (np.asarray(open_image(cut)) == expected).all()


def test_an_mpo_is_the_jpeg_that_it_begins_with():
    buffer = io.BytesIO()
    image(1).save(buffer, "MPO", save_all=True, append_images=[image(2)])
    assert (np.asarray(open_image(buffer.getvalue())) == np.asarray(open_image(encoded(1, "JPEG")))).all()


def test_a_png_with_texts_of_its_own_is_read_as_it_is():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "a caption", zip=True)
    assert (np.asarray(open_image(encoded(3, pnginfo=texts))) == np.asarray(image(3))).all()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut off, with wrong bytes, with a piece missing, or with a piece too much."""
    changed, at = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        for _ in range(rng.choice((1, 3, 20))):
            changed[rng.randrange(len(data))] = rng.choice((0, 127, 128, 255, rng.randrange(256)))
    elif kind == 2:
        del changed[at : at + rng.randrange(1, 60)]
    else:
        changed[at:at] = rng.randbytes(rng.randrange(1, 60))
    return bytes(changed)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_whatever_is_wrong_with_a_file_it_has_a_reason(kind):
    options = {"exif": exif(), "icc_profile": b"x" * 200} if kind in ("PNG", "JPEG", "WEBP") else {}
    data, rng = encoded(1, kind, (60, 40), blocks=(8, 8), **options), random.Random(kind)
    reasons = set()
    for _ in range(1500):
        try:
            assert open_image(damaged(data, rng)).mode == "RGB"
        except ImageError as error:
            reasons.add(error.reason)
    assert "image_unreadable" in reasons


def test_a_webp_whose_description_is_cut_off():
    data = encoded(1, "WEBP", exif=exif())
    for length in range(12, 40):
        with pytest.raises(ImageError):
            open_image(data[:length])
