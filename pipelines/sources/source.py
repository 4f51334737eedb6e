"""The interface of a source: it lists records without reading their images, and reads an image on request.

A source is cut into fragments, each of which some worker lists without what comes before it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from mlmamba.conversation import Turn


@dataclass(frozen=True)
class Problem:
    """Why a record is set aside: a short stable reason code (see pipelines/validate.py) and the particulars."""

    reason: str
    detail: str
    lost: int = 0
    """Bytes of the source's files that cannot be read, where nobody knows how many records they held."""
    of: int = 0
    """Bytes that the source's files should have; with `lost`, the share that is lost."""


_LONGEST_NAME = 120


def shown_location(location: str) -> str:
    """A location for a message: shortened where it is an image in the text itself, or an endless name."""
    if location.startswith("data:"):
        return f"{location[:40]}..."
    if len(location) <= _LONGEST_NAME:
        return location
    return f"{location[: _LONGEST_NAME // 2]}...{location[-_LONGEST_NAME // 4 :]} ({len(location)} characters)"


class ImageMissing(FileNotFoundError):
    """There is no image; the message says why."""


@dataclass(frozen=True)
class Record:
    """One conversation about zero or more images, as a source lists it."""

    id: str
    """Unique in its source."""
    source: str
    """Name of the source (its config's `label`)."""
    images: list[str] = field(default_factory=list)
    """Locations for the source's `read_image`, in the order in which the turns show them."""
    turns: list[Turn] = field(default_factory=list)
    """The conversation."""
    question_types: list[str] | None = None
    """Kind of each question (one per pair of turns) where the source knows it; evaluation reports accuracy by kind."""
    problem: Problem | None = None
    """Set when the source could not make sense of the entry. The record then only goes to the quarantine table."""
    repeat: int = 1
    """1 for the first time that this record is listed, 2 for the second and so on, as the source's weight asks."""


@dataclass(frozen=True)
class Fragment:
    """Consecutive records of a source."""

    unit: str = ""
    """The part of the source that it is of, one of `Source.units`."""
    start: int = 0
    stop: int = 0
    """Where it begins and ends: bytes, rows or records, as the source counts."""
    first: int = 0
    """Entries of its file before it."""
    line: int = 1
    column: int = 1
    """Where in a text it begins, for messages."""
    records: int | None = None
    """How many; None where that shows only when they are read."""
    digest: str = ""
    """Changes with what listing it gives."""


class Source(Protocol):
    """A reader of one source config."""

    def records(self) -> Iterator[Record]:
        """Every record, always in the same order, without reading images. A bad entry is yielded with a problem."""

    def units(self) -> list[str]:
        """What can be cut by itself, in order, from metadata alone: names of files, or "" for the whole source."""

    def cut(self, unit: str, size: int) -> Iterator[Fragment]:
        """Cut a unit into fragments of about `size` records, in order. Reads a text once at most, and no images.

        Raises what `records` raises.
        """

    def read(self, fragment: Fragment) -> Iterator[Record]:
        """The records of a fragment, as `records` gives them."""

    def read_image(self, location: str) -> bytes:
        """The image's file as it is stored. Raises FileNotFoundError when it is not there."""

    def fingerprint(self) -> str:
        """Digest of the listed records. It changes when they do, which marks a finished data set as out of date."""


_MOST_FRAGMENTS = 16


class Listed:
    """A source that can be listed only from its start, and so is cut into few fragments: each reads those before it."""

    def units(self) -> list[str]:
        """The whole."""
        return [""]

    def cut(self, unit: str, size: int) -> Iterator[Fragment]:
        """Cut by the number of the record, after listing all."""
        made, records = [], islice(self.records(), self.config.limit)
        while block := list(islice(records, size)):
            start = made[-1].stop if made else 0
            digest = hashlib.blake2b(repr(block).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
            made.append(Fragment(unit, start, start + len(block), records=len(block), digest=digest))
        return in_few(made)

    def read(self, fragment: Fragment) -> Iterator[Record]:
        """List from the start, and leave out what comes before."""
        return islice(self.records(), fragment.start, fragment.stop)


def in_few(fragments: list[Fragment]) -> Iterator[Fragment]:
    """The fragments of one unit, neighbours joined so that there are at most `_MOST_FRAGMENTS`."""
    together = -(-len(fragments) // _MOST_FRAGMENTS)
    for i in range(0, len(fragments), together or 1):
        parts = fragments[i : i + together]
        digest = parts[0].digest
        if len(parts) > 1:
            digest = hashlib.blake2b("".join(part.digest for part in parts).encode(), digest_size=16).hexdigest()
        records = sum(part.records for part in parts)
        yield replace(parts[0], stop=parts[-1].stop, records=records, digest=digest)
