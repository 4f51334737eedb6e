"""Cutting a split into partitions: what one tokenizing task works on, and what a rerun repeats at most.

The driver lists the records (no images) and writes each partition's descriptions to a small file; tasks get its
name. So the driver's memory holds one partition, whatever the size of the corpus.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from mlmamba.conversation import Turn
from pipelines import storage
from pipelines.losses import Losses
from pipelines.source_config import SourceConfig
from pipelines.sources import Problem, Record, open_source

_LARGEST = 64 << 20  # characters of a partition's descriptions, which the driver holds


@dataclass(frozen=True)
class Partition:
    """Some consecutive records of a split."""

    split: str
    index: int
    records: int
    """How many."""
    digest: str
    """Changes with anything the partition's token file depends on, except the images' content."""

    @property
    def name(self) -> str:
        """Stem of the partition's file names."""
        return f"{self.split}-{self.index:05d}"

    def records_file(self, work: str) -> str:
        """The record descriptions (JSON lines), which the driver writes."""
        return storage.join(work, "records", f"{self.name}.jsonl")

    def tokens_file(self, work: str) -> str:
        """The tokenized samples (schema.TOKENS)."""
        return storage.join(work, "tokens", f"{self.name}.arrow")

    def outcomes_file(self, work: str) -> str:
        """What became of each record (schema.OUTCOMES), quarantined ones included; written last."""
        return storage.join(work, "outcomes", f"{self.name}.arrow")


def list_records(sources: list[SourceConfig]) -> Iterator[Record]:
    """Every record of a split, in order."""
    for config in sources:
        yield from open_source(config).records()


def cut(
    split: str, sources: list[SourceConfig], size: int, work: str, settings: str, losses: Losses | None = None
) -> Iterator[Partition]:
    """Cut a split into partitions and write their record files.

    Args:
        split: name of the split.
        sources: its sources.
        size: records per partition; the last one may have fewer, and one with much text.
        work: folder (path or URI) for the files.
        settings: digest of all else that decides what tokenizing gives.
        losses: gets what the sources could not read.
    """
    losses = losses or Losses()
    configs = {config.label: json.dumps(config.reader_fields(), sort_keys=True) for config in sources}
    lines: list[str] = []
    labels: set[str] = set()
    index = 0

    def finish() -> Partition:
        data = "\n".join(lines).encode()
        inputs = [settings, hashlib.sha256(data).hexdigest(), *(configs[label] for label in sorted(labels))]
        partition = Partition(split, index, len(lines), hashlib.sha256("\n".join(inputs).encode()).hexdigest())
        storage.write_atomic(partition.records_file(work), data)
        return partition

    characters = 0
    for record in list_records(sources):
        losses.add(split, record)
        lines.append(_line(record))
        labels.add(record.source)
        characters += len(lines[-1])
        if len(lines) == size or characters > _LARGEST:
            yield finish()
            lines, labels, index, characters = [], set(), index + 1, 0
    if lines:
        yield finish()


def read_records(uri: str) -> Iterator[Record]:
    """The records of a partition's file."""
    for line in storage.read_bytes(uri).splitlines():
        fields = json.loads(line)
        fields["turns"] = [Turn(*turn) for turn in fields.get("turns", [])]
        if "problem" in fields:
            fields["problem"] = Problem(*fields["problem"])
        yield Record(**fields)


def _line(record: Record) -> str:
    """A record as JSON. Made by hand: dataclasses.asdict takes four times as long, and one process does all of them."""
    fields = {"id": record.id, "source": record.source}
    if record.images:
        fields["images"] = record.images
    if record.turns:
        fields["turns"] = [(turn.role, turn.text, turn.images) for turn in record.turns]
    if record.question_types is not None:
        fields["question_types"] = record.question_types
    if record.problem is not None:
        fields["problem"] = (record.problem.reason, record.problem.detail)
    if record.repeat != 1:
        fields["repeat"] = record.repeat
    return json.dumps(fields)
