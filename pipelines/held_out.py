"""Which records of a training source go to the validation split: the digest of the first image that they show decides.

Both sides list the source and read the same digests, so that neither has to know of the other, and no list of images
is kept anywhere. A record whose image cannot be read stays on the training side, which sets it aside. What else shows
an image of the validation split (a record with several images, another source) is set aside from training as
contaminated.
"""

import hashlib
from collections.abc import Iterable, Iterator

from pipelines.schema import digest
from pipelines.sources import Record, Source
from pipelines.validate import read_with_patience

_KEY = b"validation"


def is_held_out(content: bytes, share: float) -> bool:
    """Whether an image's file, or another content, is among the share of all that is held out."""
    return int.from_bytes(digest(_KEY, content)[:8], "little") < share * 2.0**64


def side_digest(own: str, split: str, share: float) -> str:
    """The digest of a partition of one side, from the one of all its records."""
    return hashlib.sha256(f"{own}\n{split} {share!r}".encode()).hexdigest()


def on_side(
    records: Iterable[Record], source: Source, share: float, split: str
) -> Iterator[tuple[Record, "Source | ReadOnce"]]:
    """The records of a split, each with what its images are read from, so that the first is not read again.

    Args:
        records: of the source, of both splits.
        source: theirs.
        share: of images that go to the validation split; 0 for a source that is not split, all of whose records come.
        split: "train" or "validation".
    """
    if not share:
        yield from ((record, source) for record in records)
        return
    for record in records:
        once = ReadOnce(source)
        if _held_out(record, once, share) == (split == "validation"):
            yield record, once


class ReadOnce:
    """A source's images, of which the last one that was read is kept."""

    def __init__(self, source: Source):
        self._source = source
        self._last: tuple[str, bytes] | None = None

    def read_image(self, location: str) -> bytes:
        """As the source's own."""
        if self._last is None or self._last[0] != location:
            self._last = location, self._source.read_image(location)
        return self._last[1]


def _held_out(record: Record, source: ReadOnce, share: float) -> bool:
    if record.problem:
        return False
    if not record.images:
        return is_held_out("\n".join(turn.text for turn in record.turns).encode("utf-8", "surrogatepass"), share)
    try:
        return is_held_out(read_with_patience(source, record.images[0]), share)
    except (OSError, ValueError):
        return False
