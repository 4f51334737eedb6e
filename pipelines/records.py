"""Partitions: what one tokenizing task works on, and what a rerun repeats at most.

A partition is a fragment of a source (sources/source.py) with its place in the split, and the choice that the source's
limit and weight make of its records. Fragments are found on Ray (fragments.py); nobody lists the records before the
task that tokenizes them.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from pipelines import storage
from pipelines.source_config import SourceConfig
from pipelines.sources import Fragment, Record, Source, open_source
from pipelines.sources.open import Choice

_PARTITIONS = 256  # of a group


@dataclass(frozen=True, slots=True)
class Partition:
    """Some consecutive records of a split."""

    split: str
    index: int
    records: int | None
    """How many; None where that shows only when they are read."""
    digest: str
    """Changes with anything the partition's token file depends on, except the content of images in files of their
    own."""
    source: str = ""
    """Label of its source."""
    fragment: Fragment | None = None
    choice: Choice | None = None
    numbers: tuple[str, int] | None = None
    """Where repeated ids are numbered: a file (fragments.number_ids) and the record batch in it."""

    @property
    def name(self) -> str:
        """Stem of the partition's file names."""
        return name_of(self.split, self.index)

    def read(self, source: Source) -> Iterator[Record]:
        """Its records, from the reader of its source."""
        return source.read(self.fragment, self.choice, self._numbers())

    def to_json(self) -> dict:
        """The same as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "Partition":
        """From what `to_json` gave, also after a way through JSON text."""
        choice = fields["choice"]
        rows = None if choice["rows"] is None else tuple(choice["rows"])
        own = {"fragment": Fragment(**fields["fragment"]), "choice": Choice(**choice | {"rows": rows})}
        numbers = fields["numbers"] and tuple(fields["numbers"])
        return cls(**fields | own | {"numbers": numbers})

    def _numbers(self) -> dict[int, int]:
        if self.numbers is None:
            return {}
        file, batch = self.numbers
        table = storage.open_arrow(file).get_batch(batch)
        return dict(zip(table["row"].to_pylist(), table["times"].to_pylist(), strict=True))


def name_of(split: str, index: int) -> str:
    """Stem of the file names of a split's partition."""
    return f"{split}-{index:05d}"


def tokens_file(work: str, name: str) -> str:
    """The tokenized samples of a partition (schema.TOKENS)."""
    return storage.join(work, "tokens", f"{name}.arrow")


def outcomes_file(work: str, name: str) -> str:
    """What became of each record of a partition (schema.OUTCOMES), quarantined ones included; written last."""
    return storage.join(work, "outcomes", f"{name}.arrow")


def list_records(sources: list[SourceConfig]) -> Iterator[Record]:
    """Every record of a split, in order."""
    for config in sources:
        yield from open_source(config).records()


def digest_of(settings: str, config: SourceConfig, fragment: Fragment, choice: Choice, numbers: str) -> str:
    """The digest of a partition.

    Args:
        settings: digest of all else that decides what tokenizing gives.
        config: of its source.
        fragment: of that.
        choice: of its records.
        numbers: digest of the numbers of repeated ids.
    """
    reader = json.dumps(config.reader_fields(), sort_keys=True)
    facts = repr((fragment.digest, choice, numbers))
    return hashlib.sha256("\n".join([settings, reader, facts]).encode()).hexdigest()


@dataclass(frozen=True)
class Group:
    """Some consecutive partitions of a split: what one task between the two passes works on."""

    split: str
    number: int
    first: int
    """Number of its first partition in the split."""
    count: int
    """How many there are."""

    @property
    def names(self) -> list[str]:
        """Of its partitions."""
        return [name_of(self.split, index) for index in range(self.first, self.first + self.count)]


def groups_of(split: str, partitions: int, size: int = _PARTITIONS) -> Iterator[Group]:
    """The groups of a split of so many partitions; at least one."""
    for number, first in enumerate(range(0, max(partitions, 1), size)):
        yield Group(split, number, first, min(size, partitions - first))
