"""The files of a tar, from its headers alone, whatever a header claims.

A header is believed only where the archive has the bytes for it: sizes below zero or beyond the end, as made on purpose
or left by a cut, end the reading there. What stands behind an end mark is read on: shards are also made by joining
tars. Formats: POSIX.1-1988 and 2001 (pax), GNU's long names and numbers.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

_BLOCK = tarfile.BLOCKSIZE
_LONGEST_EXTRA = 1 << 20  # bytes of a long name or of pax records
_ZEROS = 1 << 20  # bytes of an end mark and its padding that are looked at a time
_MORE_PIECES = 482  # of GNU's header of a sparse file: whether the list of its pieces goes on in blocks behind it
_GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"


class TarDamage(Exception):
    """The archive cannot be read on from a place.

    Args:
        problem: what is wrong there.
        at: the byte after the last whole member.
        cut: whether the archive ends too early, so that nobody knows how much is missing.
    """

    def __init__(self, problem: str, at: int, cut: bool = False):
        super().__init__(f"{problem} at byte {at}")
        self.at, self.cut = at, cut


@dataclass(frozen=True)
class Member:
    """A file of a tar, or a link (`link` is what it names), whose bytes stand elsewhere."""

    name: str
    offset: int
    size: int
    link: str | None = None
    start: int = 0
    """Where its headers begin."""
    alone: bool = True
    """Whether it can be read without what comes before: no header before it speaks for all that follow."""


def members(stream: io.BufferedReader, size: int, start: int = 0) -> Iterator[Member]:
    """Every file and link, in order.

    Args:
        stream: the archive, which can seek.
        size: of the archive in bytes.
        start: where to begin, the `start` of a member that is `alone`.

    Raises:
        TarDamage: what follows cannot be read.
    """
    at, ended = start, False
    extra: dict[str, str] = {}  # what pax records and long names say about the next member
    everywhere: dict[str, str] = {}
    whole = start  # where the last member ended that is complete
    while at < size:
        stream.seek(at)
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            if not ended or any(block):
                raise TarDamage("no end mark, it is cut off", whole, cut=True)
            return
        if not any(block):
            at, ended, extra = _behind_zeros(stream, at, size), True, {}
            whole = at
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            where = "what follows the end mark is no tar" if ended and at == whole else "a damaged header"
            raise TarDamage(where, whole) from error
        ended = False
        data = at + _BLOCK
        length = _number(extra.get("size", everywhere.get("size")), header.size, whole)
        if header.type in (_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK):
            length = header.size
        elif not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
            length = 0  # links, folders and devices have no data, whatever their size says
        if length < 0:
            raise TarDamage("a damaged header (a size below zero)", whole)
        if data + length > size:
            raise TarDamage(f"no end mark, it is cut off (a file of {length} bytes does not fit)", whole, cut=True)
        if header.type in (_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK):
            if length > _LONGEST_EXTRA:
                raise TarDamage(f"a damaged header (a name of {length} bytes)", whole)
            found = _extra(header.type, stream.read(length), whole)
            if header.type == _PAX_GLOBAL:
                everywhere |= found
            else:
                extra |= found
        else:
            about = everywhere | extra
            name = about.get("path", header.name)
            sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in about)
            if header.islnk() or header.issym() or sparse:
                link = "a sparse file" if sparse else about.get("linkpath", header.linkname)
                yield Member(name, data, length, link, whole, not everywhere)
            elif header.isreg():
                yield Member(name, data, length, None, whole, not everywhere)
            extra = {}
            whole = data + -(-length // _BLOCK) * _BLOCK
            if header.type == tarfile.GNUTYPE_SPARSE and block[_MORE_PIECES]:
                raise TarDamage("a sparse file in many pieces, which is not read", whole)
        at = data + -(-length // _BLOCK) * _BLOCK
    if not ended:
        raise TarDamage("no end mark, it is cut off", min(whole, size), cut=True)


def _behind_zeros(stream: io.BufferedReader, at: int, size: int) -> int:
    """The start of the first block that is not zero, or the archive's end."""
    stream.seek(at)
    while at < size:
        chunk = stream.read(_ZEROS)
        if not chunk:
            return size
        rest = chunk.lstrip(b"\0")
        if rest:
            return at + (len(chunk) - len(rest)) // _BLOCK * _BLOCK
        at += len(chunk)
    return size


def _number(text: str | None, otherwise: int, whole: int) -> int:
    """A pax size."""
    if text is None:
        return otherwise
    if not text.isascii() or not text.lstrip("-").isdecimal() or len(text) > 20:
        raise TarDamage("a damaged header (a size that is no number)", whole)
    return int(text)


def _extra(kind: bytes, data: bytes, whole: int) -> dict[str, str]:
    """What a long name or pax records say. A pax record is "LENGTH KEY=VALUE\\n"."""
    if kind in (_GNU_NAME, _GNU_LINK):
        text = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        return {"path" if kind == _GNU_NAME else "linkpath": text}
    found, at = {}, 0
    while at < len(data) and data[at] != 0:
        digits, space, _ = data[at : at + 8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = data[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if not equals or data[at + length - 1 : at + length] != b"\n":
            raise TarDamage("a damaged header (pax records)", whole)
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at += length
    return found
