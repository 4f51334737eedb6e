"""Where the members of a zip archive lie, from its central directory alone, and how one of them is read.

The archive is neither unpacked nor read whole, so it can stay in an object store. The directory is kept as sorted
hashes of the names: 25 bytes a member, where zipfile's own takes some 600, and LLaVA's 558K images are one archive.
Format: PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3 (zip64).
"""

import hashlib
import struct
import unicodedata
import zlib
from collections.abc import Iterator

import numpy as np

from pipelines import storage

_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_END_SIZE, _LOCATOR_SIZE, _ENTRY_SIZE, _LOCAL_SIZE = 22, 20, 46, 30
_LONGEST_COMMENT = 0xFFFF
_CHUNK = 1 << 22
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _CHECKSUM_BEHIND, _UTF8 = 0x1, 0x8, 0x800
_ZIP64_FIELD = 1
_APPLE = "__MACOSX/"  # what macOS puts beside the files
_SLACK = 64  # what a local header usually says besides the name is less
_FULL = 0xFFFFFFFF  # the value is in the zip64 field

_FACTS = np.dtype([("name", "<u8"), ("offset", "<u8"), ("length", "<u8")])


class ZipIndex:
    """The members of an archive.

    Args:
        file: a pyarrow NativeFile (or other object with size and read_at).

    Raises:
        ValueError: it is not a zip archive, or its directory is damaged.
    """

    def __init__(self, file):
        start, size = _find_directory(file)
        blocks, block = [], []
        tops: set[str] = set()
        for name, offset, length in _entries(file, start, size):
            if len(tops) < 2 and not name.startswith(_APPLE):
                folder, slash, _ = name.partition("/")
                tops.add(folder if slash else "")
            block.append((_hash(name), offset, _overhead(name) + length))
            if len(block) == 1 << 16:
                blocks.append(np.array(block, dtype=_FACTS))
                block = []
        members = np.concatenate([*blocks, np.array(block, dtype=_FACTS)])
        order = np.argsort(members["name"], kind="stable")
        self._names, self._offsets, self._lengths = (members[field][order] for field in ("name", "offset", "length"))
        self.top = tops.pop() if len(tops) == 1 else ""
        """The one folder that all members are in, "" where there is none."""

    def __len__(self) -> int:
        return len(self._names)

    def find(self, name: str) -> tuple[int, int, str] | None:
        """Offset and length of what has to be read for a member, and the name that it has; None where there is none.

        Of several with one name, the last. A name may be composed otherwise (NFC, NFD), and stand within the one folder
        that all of the archive is in.
        """
        forms = [name]
        if not name.isascii():
            forms = dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))])
        for form in [*forms, *(f"{self.top}/{form}" for form in forms if self.top)]:
            place = self._place(form)
            if place:
                return *place, form
        return None

    def _place(self, name: str) -> tuple[int, int] | None:
        wanted = _hash(name)
        at = int(np.searchsorted(self._names, wanted, side="right")) - 1
        if at < 0 or self._names[at] != wanted:
            return None
        return int(self._offsets[at]), int(self._lengths[at])


def directory_digest(file) -> str:
    """A digest that changes with an archive's list of members. Raises ValueError where it has none."""
    start, size = _find_directory(file)
    digest = hashlib.sha256()
    for at in range(start, start + size, _CHUNK):
        digest.update(file.read_at(min(_CHUNK, start + size - at), at))
    return digest.hexdigest()


def read_member(read, offset: int, length: int, name: str, limit: int) -> bytes:
    """The content of a member.

    Args:
        read: function (offset, length) that gives those bytes of the archive.
        offset: as `ZipIndex.find` gave it.
        length: as `ZipIndex.find` gave it.
        name: the member's, to be sure.
        limit: most bytes that it may have.

    Raises:
        ValueError: the archive has something else there, or the member is encrypted or compressed in another way.
        TooLarge: over `limit`.
    """
    data = read(offset, length)
    if len(data) < _LOCAL_SIZE or data[:4] != _LOCAL:
        raise ValueError("the archive has no member there: it is cut off or was changed since it was listed")
    flags, method, crc, name_size, extra_size = struct.unpack("<2xHH4xL8xHH", data[4:_LOCAL_SIZE])
    if _name(data[_LOCAL_SIZE : _LOCAL_SIZE + name_size], flags) != name:
        raise ValueError("the archive has another member there: it was changed since it was listed")
    if flags & _ENCRYPTED or method not in (_STORED, _DEFLATED):
        raise ValueError("the member is encrypted or packed in a way other than stored or deflated: zip it anew")
    content_size = length - _overhead(name)
    content = data[_LOCAL_SIZE + name_size + extra_size :][:content_size]
    missing = content_size - len(content)
    if missing:
        content += read(offset + length, missing) if len(data) == length else b""
    if method == _DEFLATED:
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = unpack.decompress(content, limit + 1)
        except zlib.error as error:
            raise ValueError(f"the member's data is damaged: {error}") from error
    if len(content) > limit:
        raise storage.TooLarge(f"the member has more than {limit} bytes")
    if not flags & _CHECKSUM_BEHIND and zlib.crc32(content) != crc:
        raise ValueError("the member's checksum is wrong: the archive is damaged")
    return content


def _find_directory(file) -> tuple[int, int]:
    """Offset and size of the central directory."""
    size = file.size()
    tail_start = max(0, size - _END_SIZE - _LONGEST_COMMENT)
    tail = file.read_at(size - tail_start, tail_start)
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + _END_SIZE:
        raise ValueError("it is not a zip archive, or its end is cut off")
    length, start = struct.unpack_from("<LL", tail, at + 12)
    locator = at - _LOCATOR_SIZE
    if locator >= 0 and tail[locator : locator + 4] == _LOCATOR64:
        (end64,) = struct.unpack_from("<Q", tail, locator + 8)
        record = file.read_at(56, end64)
        if record[:4] != _END64 or len(record) < 56:
            raise ValueError("its zip64 end record is damaged")
        length, start = struct.unpack_from("<QQ", record, 40)
    if start + length > size:
        raise ValueError("its directory lies outside the file; it is cut off at the front or damaged")
    return start, length


def _entries(file, start: int, size: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset of the local header and size of the packed data of every member that is a file."""
    buffer, at, place, end = b"", 0, start, start + size

    while True:
        need = _ENTRY_SIZE
        if len(buffer) - at >= need:
            need += sum(struct.unpack_from("<HHH", buffer, at + 28))
        if len(buffer) - at < need:
            if place == end:
                if at == len(buffer):
                    return
                raise ValueError("its directory is damaged")
            chunk = file.read_at(min(_CHUNK, end - place), place)
            if not chunk:
                raise ValueError("its directory is cut off")
            buffer, at, place = buffer[at:] + chunk, 0, place + len(chunk)
            continue
        if buffer[at : at + 4] != _ENTRY:
            raise ValueError("its directory is damaged")
        flags, packed, unpacked, name_size, extra_size, comment_size, offset = struct.unpack_from(
            "<8xH10xLLHHH8xL", buffer, at
        )
        name = _name(buffer[at + _ENTRY_SIZE : at + _ENTRY_SIZE + name_size], flags)
        if _FULL in (packed, offset):
            extra = buffer[at + _ENTRY_SIZE + name_size :][:extra_size]
            packed, offset = _zip64(extra, unpacked == _FULL, packed, offset)
        at += _ENTRY_SIZE + name_size + extra_size + comment_size
        if not name.endswith("/"):
            yield name, offset, packed


def _zip64(extra: bytes, has_unpacked: bool, packed: int, offset: int) -> tuple[int, int]:
    """The values that did not fit into 32 bits. They stand in a fixed order, each only if it did not fit."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == _ZIP64_FIELD:
            numbers = iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            if has_unpacked:
                next(numbers, None)
            packed = next(numbers, packed) if packed == _FULL else packed
            offset = next(numbers, offset) if offset == _FULL else offset
            return packed, offset
        at += 4 + size
    return packed, offset


def _overhead(name: str) -> int:
    """Bytes read with a member besides its data, so that header, name and data are one read."""
    return _LOCAL_SIZE + len(name.encode("utf-8", "surrogateescape")) + _SLACK


def _name(data: bytes, flags: int) -> str:
    """A member's name. Zips made on a Mac have UTF-8 without the flag; text in cp437 is hardly ever valid UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("utf-8" if flags & _UTF8 else "cp437", "surrogateescape")


def _hash(name: str) -> np.uint64:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return np.frombuffer(digest, dtype="<u8")[0]
