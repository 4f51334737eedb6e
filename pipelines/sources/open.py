"""Open a source by its config, and list only the records that its limit and weight ask for.

Which ones follows from their numbers in the source, so a worker that lists a fragment chooses as one who lists all.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import islice

import numpy as np

from pipelines.shuffle import permutation
from pipelines.source_config import ParquetSource, SourceBase, SourceConfig, WebDatasetSource
from pipelines.sources.source import Fragment, Record, Source

_BLOCK = 1024  # records among which a share is chosen at a time
_READERS = {
    "captions": ("pipelines.sources.captions", "Captions"),
    "coco_captions": ("pipelines.sources.coco", "CocoCaptions"),
    "easy_vqa": ("pipelines.sources.easy_vqa", "EasyVQA"),
    "llava": ("pipelines.sources.llava", "Llava"),
    "parquet": ("pipelines.sources.parquet", "Parquet"),
    "questions": ("pipelines.sources.annotations", "Questions"),
    "vqav2": ("pipelines.sources.coco", "Vqav2"),
    "webdataset": ("pipelines.sources.webdataset", "WebDataset"),
}
"""Module and class of each type of source. Imported on use: only users of a source need its packages."""


def open_source(config: SourceConfig) -> Source:
    """Return the reader of a source config, which lists the records that the config's limit and weight ask for."""
    module, name = _READERS[config.type]
    return Selection(getattr(import_module(module), name)(config), config)


@dataclass(frozen=True)
class Choice:
    """Which records of a fragment are used."""

    repeat: int = 1
    """How often the source's weight has listed it, this time included."""
    take: int | None = None
    """Only so many; None for all."""
    rows: tuple[int, ...] | None = None
    """Of those, only these; None for all."""


class Selection:
    """A source limited, repeated and numbered as its config asks."""

    def __init__(self, source: Source, config: SourceBase):
        self._source, self._config = source, config

    def records(self) -> Iterator[Record]:
        """List the records as often as the weight's whole part says, then a share of them for its fraction."""
        whole = int(self._config.weight)
        for repeat in range(1, whole + 1):
            yield from self._listed(repeat)
        fraction = self._config.weight - whole
        if fraction:
            yield from share(self._listed(whole + 1), fraction, self._config.label, self._config.seed)

    @property
    def images_inside(self) -> bool:
        """Whether the images stand in the files that fragments are of, so that their digests cover them."""
        return isinstance(self._config, ParquetSource | WebDatasetSource)

    @property
    def held_out(self) -> float:
        """Share of the images that go to the validation split."""
        return self._config.validation

    def units(self) -> list[str]:
        """The source's own."""
        return self._source.units()

    def cut(self, unit: str, size: int) -> Iterator[Fragment]:
        """The source's own fragments, before limit and weight."""
        return self._source.cut(unit, size)

    def read(self, fragment: Fragment, choice: Choice = Choice(), numbers: dict[int, int] | None = None):
        """The records of a fragment that are used.

        Args:
            fragment: of the source.
            choice: which of its records.
            numbers: of a source whose repeated ids are numbered: by record, how often its id has come by then, where
                that is more than once.
        """
        chosen = None if choice.rows is None else {*choice.rows}
        for row, record in enumerate(islice(self._source.read(fragment), choice.take)):
            if chosen is not None and row not in chosen:
                continue
            times = (numbers or {}).get(row, 1)
            yield _repeated(record if times == 1 else replace(record, id=f"{record.id}#{times}"), choice.repeat)

    def read_image(self, location: str) -> bytes:
        """The image's file."""
        return self._source.read_image(location)

    def fingerprint(self) -> str:
        """The source's own digest. Limit and weight are not in it: the recipe's digest covers them."""
        return self._source.fingerprint()

    def _listed(self, repeat: int) -> Iterator[Record]:
        """List every record up to the limit; from the second repeat on, ids end in @2, @3, ..."""
        records = islice(self._source.records(), self._config.limit)
        if self._config.repeated_ids == "number":
            records = _numbered(records)
        for record in records:
            yield _repeated(record, repeat)


def _repeated(record: Record, repeat: int) -> Record:
    return record if repeat == 1 else replace(record, id=f"{record.id}@{repeat}", repeat=repeat)


def share(records: Iterable[Record], fraction: float, *key: int | str) -> Iterator[Record]:
    """Choose a share of the records, evenly along the list and in its order: floor(n x fraction) of n records.

    Args:
        records: in a fixed order.
        fraction: between 0 and 1.
        key: seed of the choice; the same key chooses the same records.
    """
    records = iter(records)
    seen = taken = number = 0
    while block := list(islice(records, _BLOCK)):
        seen += len(block)
        count = int(seen * fraction + 1e-9) - taken  # 0.29 x 100 is a little less than 29
        chosen = permutation(len(block), *key, number)[:count]
        yield from (block[i] for i in sorted(chosen.tolist()))
        taken, number = taken + count, number + 1


def share_rows(start: int, stop: int, total: int, fraction: float, *key: int | str) -> list[int]:
    """The places that `share` chooses among records `start` to `stop` of `total`."""
    rows = []
    for number in range(start // _BLOCK, -(-stop // _BLOCK)):
        first, last = number * _BLOCK, min((number + 1) * _BLOCK, total)
        count = int(last * fraction + 1e-9) - int(first * fraction + 1e-9)
        rows += (first + np.sort(permutation(last - first, *key, number)[:count])).tolist()
    return [row for row in rows if start <= row < stop]


def _numbered(records: Iterable[Record]) -> Iterator[Record]:
    """Add #2, #3, ... to the id of a record whose id came before."""
    times_seen: dict[str, int] = {}
    for record in records:
        times = times_seen[record.id] = times_seen.get(record.id, 0) + 1
        yield record if times == 1 else replace(record, id=f"{record.id}#{times}")
