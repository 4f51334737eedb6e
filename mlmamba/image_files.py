"""Encoded images: which format some bytes are, what else they are where they are none, and the file without metadata.

Each format is opened by its own reader of Pillow, chosen here by the first bytes. Pillow's other readers are never
asked: some of them run other programs.
"""

import json
import re
import zlib
from collections.abc import Iterator

from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

OPENERS = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WEBP": WebPImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "TIFF": TiffImageFile,
}
"""Every format that can be decoded. An MPO, JPEG as some cameras write it, is opened as the JPEG it begins with."""

_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"mif1": "HEIC", b"msf1": "HEIC", b"hei": "HEIC", b"hev": "HEIC"}
_OTHER_IMAGES = {
    b"%!PS": "EPS or PostScript",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"8BPS": "Photoshop",
    b"\0\0\1\0": "ICO",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"v/1\x01": "OpenEXR",
    b"SIMPLE  =": "FITS",
    b"qoif": "QOI",
}
_OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for: run git lfs pull",
    b"%PDF": "a PDF document: export its pages as PNG",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip data",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x1a\x45\xdf\xa3": "a video (Matroska or WebM)",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
}

_HTML = (b"!doctype html", b"html", b"head", b"body", b"title", b"meta", b"script")


def format_of(data: bytes) -> str | None:
    """The name in OPENERS of the format that an encoded image begins as, or None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    return "TIFF" if data.startswith(_TIFF) else None


def other_image(data: bytes) -> str | None:
    """The name of an image format that is not in OPENERS, or None."""
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        return _BRANDS.get(brand) or _BRANDS.get(brand[:3])
    for mark, name in _OTHER_IMAGES.items():
        if data.startswith(mark):
            return name
    if re.match(rb"P[1-7]\s", data):
        return "PPM"
    if data[128:132] == b"DICM":
        return "DICOM"
    return "SVG" if _root(data) == b"svg" else None


def describe(data: bytes) -> str:
    """What bytes are that are no image, for a person who expected one: "an HTML page", "an empty file"."""
    if not data:
        return "an empty file"
    for mark, name in _OTHER_FILES.items():
        if data.startswith(mark):
            return name
    if data[4:8] == b"ftyp":
        return "a video (MP4 or QuickTime)"
    if not data.strip(b"\0"):
        return f"{len(data)} zero bytes: a file that was never written"
    root = _root(data)
    if root in _HTML:
        return f"an HTML page, such as a login or an error page{_quoted(data)}"
    if root:
        return f"an XML document, such as a store's error{_quoted(data)}"
    if data.lstrip()[:1] in (b"{", b"[") and _is_json(data):
        return f"JSON, such as a server's error{_quoted(data)}"
    text = _quoted(data)
    return f"text{text}" if text else f"{len(data)} bytes of no known format"


def declared_size(kind: str, data: bytes) -> tuple[int, int] | None:
    """Width and height by the header of a format whose reader takes memory for its pixels when it opens a file."""
    if kind != "WEBP" or len(data) < 30:
        return None
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def without_metadata(kind: str, data: bytes) -> Iterator[bytes]:
    """The same pixels in a file that has no more metadata than its EXIF, then in one without any.

    Text, colour profiles and the like decide nothing about the pixels, so where Pillow stops at one that is damaged or
    too large, the image is read without them. Gives nothing for formats and files that have none.
    """
    strip = {"PNG": _plain_png, "JPEG": _plain_jpeg, "WEBP": _plain_webp}.get(kind)
    before = data
    for keep_exif in (True, False) if strip else ():
        plain = strip(data, keep_exif)
        if plain != before:
            yield plain
        before = plain


def _plain_png(data: bytes, keep_exif: bool) -> bytes:
    """Without the ancillary chunks, whose names begin with a small letter, but tRNS, which says what is transparent."""
    parts, at = [data[:8]], 8
    while at + 8 <= len(data):
        name, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        exif = name == b"eXIf" and zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        if not name[0] & 0x20 or name == b"tRNS" or (keep_exif and exif):
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def _plain_jpeg(data: bytes, keep_exif: bool) -> bytes:
    """Without the application segments and comments, but those of JFIF and Adobe, which say how colours are coded."""
    parts, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at : at + 2] != b"\xff\xda":
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF):  # padding
            at += 1
            continue
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xD0 <= marker <= 0xD8 or marker == 0x01:  # they stand alone
            end = at + 2
        segment = data[at:end]
        jfif = marker == 0xE0 and segment[4:8] == b"JFIF" and len(segment) >= 16
        adobe = marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 14
        exif = marker == 0xE1 and segment[4:10] == b"Exif\0\0" and keep_exif
        if jfif or adobe or exif or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            parts.append(segment)
        at = end
    return b"".join([*parts, data[at:]])


def _plain_webp(data: bytes, keep_exif: bool) -> bytes:
    parts, at = [], 12
    kept = {b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"} | ({b"EXIF"} if keep_exif else set())
    while at + 8 <= len(data):
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        chunk = bytearray(data[at : at + 8 + length])
        if name == b"VP8X" and len(chunk) > 8:
            chunk[8] &= ~0x24 if keep_exif else ~0x2C  # it also says which kinds of metadata there are
        if name in kept:
            parts.append(bytes(chunk) + b"\0" * (length & 1))
        at += 8 + length + (length & 1)
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _root(data: bytes) -> bytes:
    """Name of a document's first element in small letters, b"!doctype html" for that line, b"" for what has none."""
    rest = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    while rest.startswith((b"<?", b"<!")) and not rest.startswith(b"<!doctype html"):
        rest = rest.partition(b"-->" if rest.startswith(b"<!--") else b">")[2].lstrip()
    name = re.match(rb"<((?:!doctype )?[a-z][a-z0-9:]*)[\s/>]", rest)
    return name[1] if name else b""


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data[: 1 << 20])
    except (ValueError, RecursionError):
        return False
    return True


def _quoted(data: bytes) -> str:
    """How a text begins, or "" when it is none."""
    try:
        text = data[:200].decode("utf-8", errors="strict" if len(data) <= 200 else "ignore")
    except UnicodeDecodeError:
        return ""
    shown = " ".join(text.split())
    return f": {shown[:60]!r}" if shown and shown.isprintable() else ""
