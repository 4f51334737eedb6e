"""The interface of a source: it lists records without reading their images, and reads an image on request."""

from collections.abc import Iterator
from dataclasses import dataclass, field
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


class Source(Protocol):
    """A reader of one source config."""

    def records(self) -> Iterator[Record]:
        """Every record, always in the same order, without reading images. A bad entry is yielded with a problem."""

    def read_image(self, location: str) -> bytes:
        """The image's file as it is stored. Raises FileNotFoundError when it is not there."""

    def fingerprint(self) -> str:
        """Digest of the listed records. It changes when they do, which marks a finished data set as out of date."""
