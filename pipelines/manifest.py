"""manifest.json: what a finished data set holds.

The manifest is written last, so a folder without one is not a finished data set. Both splits stand in one manifest: one
recipe and one tokenizer make them, a run trains on one and validates on the other, and one digest names both.
"""

import hashlib
import json
import platform

import pyarrow as pa
from pydantic import Field, ValidationError

from mlmamba import __version__
from mlmamba.image_layout import ImageLayout
from pipelines import storage
from pipelines.config import SCHEMA_VERSION, StrictModel

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
    """One split: its shards, and how many of its records were packed, cut or set aside."""

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
    quarantined_by_source: dict[str, dict[str, int]]
    """The same by source."""
    cut: int
    """Samples that lost turns: those over `max_tokens`, or a last question without an answer."""
    cut_turns: int
    """How many turns they lost."""
    without_images: int | None = None
    """Samples that show no image. None in sets of versions that did not count them."""
    lost: dict[str, float] = Field(default_factory=dict)
    """Share of a source's bytes that could not be read, for sources that lost any: how many records is not known."""


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
    """`data_identity` of the config and the other arguments of `prepare`."""
    sources: dict[str, str]
    """Fingerprint of each source's list of records, by split/name."""
    excluded: dict[str, int] = Field(default_factory=dict)
    """Images that training records must not show, by evaluation set."""
    max_tokens: int
    tokens_per_image: int | dict[str, int]
    """Or, where the size of an image decides, by what (mlmamba/image_layout.py)."""
    pixels: int = 1
    """Version of the rules by which its images become RGB (mlmamba/image_colours.py). Training reads them by these.
    Sets that were prepared before there was such a field are of version 1."""
    quarantine_sha256: str | None = None
    """sha256 of quarantine.arrow; sets that were prepared before there was such a field have none."""
    splits: dict[str, SplitInfo]
    """The train split, and the validation split where the recipe has one."""

    def without_images(self) -> str:
        """How many training samples show no image, for a person: more than expected is a corpus that was not read."""
        train = self.splits["train"]
        if train.without_images is None:
            return "how many training samples show no image was not counted by the version that made the set"
        return f"{train.without_images:,} of {train.samples:,} training samples show no image"

    @property
    def layout(self) -> ImageLayout:
        """How many tokens images take; of what is square, not the size."""
        return ImageLayout.of(self.tokens_per_image)

    @property
    def shards(self) -> list[ShardInfo]:
        """All shards, train first."""
        return [shard for split in self.splits.values() for shard in split.shards]

    @property
    def rows(self) -> int:
        """Rows of all splits."""
        return sum(split.rows for split in self.splits.values())

    @property
    def training_digest(self) -> str:
        """The digest of what a model sees: another one where the same files are read by other rules of colour."""
        if self.pixels == 1:
            return self.digest
        return hashlib.sha256(f"{self.digest}\npixels {self.pixels}".encode()).hexdigest()

    def content_digest(self) -> str:
        """Compute the digest from the shards and the tokenizer; `digest` has to equal it."""
        parts = [shard.sha256 for shard in self.shards] + [self.tokenizer_digest]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @classmethod
    def load(cls, uri: str) -> "Manifest":
        """Read the manifest of the data set in a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is not a manifest, or has another schema version.
        """
        file = storage.join(uri, MANIFEST_FILE)
        if not storage.exists(file):
            raise FileNotFoundError(
                f"no {MANIFEST_FILE} under {storage.shown(uri)}: the data set is not finished; run mlmamba prepare"
            )
        data = storage.read_bytes(file)
        try:
            version = json.loads(data)["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{storage.shown(file)} is not a manifest: {error!r}") from error
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{storage.shown(file)} has schema version {version}, expected {SCHEMA_VERSION}; run mlmamba prepare "
                "again to make the data set in this version"
            )
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise ValueError(
                f"{storage.shown(file)} is not a manifest of schema version {SCHEMA_VERSION}: {error}"
            ) from error

    def save(self, uri: str) -> None:
        """Write manifest.json, which makes the folder a data set."""
        storage.write_atomic(storage.join(uri, MANIFEST_FILE), self.model_dump_json(indent=2).encode())


def split_info(
    shards: list[ShardInfo],
    max_tokens: int,
    records: int,
    quarantined: dict[str, int],
    cut: int,
    cut_turns: int = 0,
    without_images: int | None = None,
    lost: dict[str, float] | None = None,
    quarantined_by_source: dict[str, dict[str, int]] | None = None,
) -> SplitInfo:
    """Sum up a split's shards, which are given in row order. The other arguments are fields of `SplitInfo`."""
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
        quarantined_by_source=quarantined_by_source or {},
        cut=cut,
        cut_turns=cut_turns,
        without_images=without_images,
        lost=lost or {},
        **totals,
    )


def _created_by() -> str:
    return f"mlmamba {__version__}, pyarrow {pa.__version__}, Python {platform.python_version()}"
