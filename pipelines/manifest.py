"""manifest.json: what a finished data set holds. It is written last, so a folder without one is not a data set.

Both splits stand in one manifest, because they are made by one recipe with one tokenizer and a run trains on one and
measures on the other: one digest names what the run saw, and there is no moment when only half of it is there.
"""

import hashlib
import platform

import pyarrow as pa
from pydantic import Field, ValidationError

from mlmamba import __version__
from pipelines import storage
from pipelines.config import StrictModel

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_PATH = "tokenizer/tokenizer.json"


class ShardInfo(StrictModel):
    """One Arrow IPC file of packed rows."""

    path: str
    """Relative to the data set's folder."""
    rows: int
    samples: int
    tokens: int
    """Without padding; image tokens included."""
    loss_tokens: int
    """Tokens that have a label."""
    images: int
    bytes: int
    sha256: str
    samples_by_source: dict[str, int]


class SplitInfo(StrictModel):
    """One split: its shards and what became of its records."""

    shards: list[ShardInfo]
    """In row order."""
    rows: int
    samples: int
    tokens: int
    loss_tokens: int
    images: int
    fill: float
    """tokens / (rows x max_tokens)."""
    samples_by_source: dict[str, int]
    records: int
    """Records read. The quarantined ones and the samples add up to them."""
    quarantined: dict[str, int]
    """Records set aside, by reason (pipelines/validate.py). The table is quarantine.arrow."""
    cut: int
    """Samples that lost turns to `max_tokens`."""


class Manifest(StrictModel):
    """The whole data set."""

    schema_version: int = SCHEMA_VERSION
    created_by: str = Field(default_factory=lambda: _created_by())
    """Versions of the packages that wrote it."""
    digest: str
    """sha256 over the shards' sha256s in order and the tokenizer's: equal digests are equal data."""
    tokenizer_digest: str
    """sha256 of tokenizer/tokenizer.json."""
    recipe_digest: str
    """Of the config and the other arguments of `prepare`, so far as they decide the content."""
    sources: dict[str, str]
    """Fingerprint of each source's list of records, by split/name."""
    max_tokens: int
    tokens_per_image: int
    splits: dict[str, SplitInfo]
    """The train split, and the validation split where the recipe has one."""

    @property
    def shards(self) -> list[ShardInfo]:
        """All shards, train first."""
        return [shard for split in self.splits.values() for shard in split.shards]

    @property
    def rows(self) -> int:
        """Rows of all splits."""
        return sum(split.rows for split in self.splits.values())

    def content_digest(self) -> str:
        """What `digest` has to be."""
        parts = [shard.sha256 for shard in self.shards] + [self.tokenizer_digest]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @classmethod
    def load(cls, uri: str) -> "Manifest":
        """The manifest of the data set in a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a manifest, or of another schema version.
        """
        file = storage.join(uri, MANIFEST_FILE)
        if not storage.exists(file):
            raise FileNotFoundError(
                f"no {MANIFEST_FILE} under {storage.shown(uri)}: the data set is not finished; run mlmamba prepare"
            )
        try:
            manifest = cls.model_validate_json(storage.read_bytes(file))
        except ValidationError as error:
            raise ValueError(
                f"{storage.shown(file)} is not a manifest of schema version {SCHEMA_VERSION}: {error}"
            ) from error
        if manifest.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"{storage.shown(file)} has schema version {manifest.schema_version}, expected {SCHEMA_VERSION}; "
                "run mlmamba prepare into an empty folder"
            )
        return manifest

    def save(self, uri: str) -> None:
        """Write manifest.json, which makes the folder a data set."""
        storage.write_atomic(storage.join(uri, MANIFEST_FILE), self.model_dump_json(indent=2).encode())


def split_info(
    shards: list[ShardInfo], max_tokens: int, records: int, quarantined: dict[str, int], cut: int
) -> SplitInfo:
    """Sum up a split's shards, which are given in row order."""
    by_source: dict[str, int] = {}
    for shard in shards:
        for source, samples in shard.samples_by_source.items():
            by_source[source] = by_source.get(source, 0) + samples
    totals = {
        name: sum(getattr(shard, name) for shard in shards)
        for name in ("rows", "samples", "tokens", "loss_tokens", "images")
    }
    return SplitInfo(
        shards=shards,
        fill=round(totals["tokens"] / (totals["rows"] * max_tokens), 6),
        samples_by_source=dict(sorted(by_source.items())),
        records=records,
        quarantined=dict(sorted(quarantined.items())),
        cut=cut,
        **totals,
    )


def verify(uri: str) -> list[str]:
    """Read every file of a data set again and compare it with the manifest.

    Returns:
        One sentence per problem; an empty list means that the data set is what the manifest says.

    Raises:
        FileNotFoundError, ValueError: as `Manifest.load`.
    """
    manifest = Manifest.load(uri)
    files = [(shard.path, shard.bytes, shard.sha256) for shard in manifest.shards]
    files.append((TOKENIZER_PATH, None, manifest.tokenizer_digest))
    problems = []
    for path, expected_size, expected_sha256 in files:
        try:
            size, sha256 = storage.checksum(storage.join(uri, path))
        except FileNotFoundError:
            problems.append(f"{path} is missing")
            continue
        if expected_size not in (None, size):
            problems.append(f"{path} has {size} bytes, the manifest says {expected_size}")
        elif sha256 != expected_sha256:
            problems.append(f"{path} has sha256 {sha256}, the manifest says {expected_sha256}")
    if manifest.content_digest() != manifest.digest:
        problems.append(f"{MANIFEST_FILE} has digest {manifest.digest}, its shards give {manifest.content_digest()}")
    return problems


def _created_by() -> str:
    return f"mlmamba {__version__}, pyarrow {pa.__version__}, Python {platform.python_version()}"
