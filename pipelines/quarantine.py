"""The table of records that were set aside, what became of all records by source, and the limit on bad ones."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.dedup import CONTAMINATED, DUPLICATE_ID, NEAR, Removal, Removals
from pipelines.records import Partition
from pipelines.schema import QUARANTINE
from pipelines.tokenize import iter_outcomes
from pipelines.validate import REMOVED

QUARANTINE_FILE = "quarantine.arrow"
_LONGEST_EXAMPLE = 300  # characters of a record in a message
_COLUMNS = ["record_id", "source", "images", "cut_turns", "reason", "detail"]


@dataclass
class Tally:
    """What became of the records of one split."""

    records: int = 0
    quarantined: Counter = field(default_factory=Counter)
    """Records set aside, by (source, reason)."""
    cut: int = 0
    """Samples that lost turns."""
    cut_turns: int = 0
    """How many they lost."""
    without_images: int = 0
    """Samples that show no image."""
    first: dict[str, str] = field(default_factory=dict)
    """The first record of each reason, for a person."""

    def by_reason(self) -> dict[str, int]:
        """Records set aside."""
        counts = Counter()
        for (_, reason), count in self.quarantined.items():
            counts[reason] += count
        return dict(sorted(counts.items()))

    def by_source(self) -> dict[str, dict[str, int]]:
        """Records set aside, by source and reason."""
        counts = defaultdict(dict)
        for (source, reason), count in sorted(self.quarantined.items()):
            counts[source][reason] = count
        return dict(counts)

    @property
    def bad(self) -> int:
        """Records set aside because something is wrong with them."""
        return sum(count for (_, reason), count in self.quarantined.items() if reason not in REMOVED)


_BATCH = 1000  # records


def write_quarantine(out: str, work: str, partitions: list[Partition], removals: Removals) -> dict[str, Tally]:
    """Gather the records that are not used into one table, in the order of the sources, and count.

    Args:
        out: folder of the data set, which gets the table.
        work: folder of the partitions' files.
        partitions: tokenized.
        removals: of these partitions.

    Returns:
        The counts by split.
    """
    tallies: dict[str, Tally] = defaultdict(Tally)
    causes: dict[tuple[str, int], str] = {}
    bad: list[dict] = []
    with (
        storage.atomic_file(storage.join(out, QUARANTINE_FILE)) as path,
        pa.OSFile(path, "wb") as sink,
        pa.ipc.new_file(sink, QUARANTINE) as writer,
    ):
        for partition, outcomes in iter_outcomes(partitions, work, _COLUMNS):
            removed, named = removals.of(partition.name), removals.causes(partition.name)
            tally = tallies[partition.split]
            tally.records += outcomes.num_rows
            blind = pc.and_(outcomes["reason"].is_null(), pc.equal(outcomes["images"], 0)).to_numpy()
            tally.without_images += int(blind.sum()) - sum(bool(blind[i]) for i in removed)
            told = pc.or_(outcomes["reason"].is_valid(), pc.greater(outcomes["cut_turns"], 0)).to_numpy()
            told = sorted({*np.flatnonzero(told).tolist(), *removed, *named})
            for i, row in zip(told, outcomes.take(pa.array(told, pa.int64())).to_pylist(), strict=True):
                if i in named:
                    causes[partition.name, i] = f"{row['record_id']} of {row['source']}"
                if i in removed:
                    row |= {"reason": removed[i].reason, "detail": _detail(removed[i], causes)}
                if row["reason"]:
                    bad.append({"split": partition.split} | {name: row[name] for name in QUARANTINE.names[1:]})
                    tally.quarantined[row["source"], row["reason"]] += 1
                    tally.first.setdefault(row["reason"], _shown(row))
                elif row["cut_turns"]:
                    tally.cut += 1
                    tally.cut_turns += row["cut_turns"]
            while len(bad) >= _BATCH:  # of one size, so that the same table is the same file
                writer.write_table(pa.Table.from_pylist(bad[:_BATCH], schema=QUARANTINE))
                bad = bad[_BATCH:]
        if bad:
            writer.write_table(pa.Table.from_pylist(bad, schema=QUARANTINE))
    return dict(tallies)


def allowed(limit: float, total: int) -> int:
    """Whole records of `total` that may be set aside at a limit (0.29 of 100 is 29, whatever floats make of it)."""
    return int(limit * total + 1e-9)


def over_limit(limit: float, total: int, tallies: dict[str, Tally], out: str) -> str:
    """The message that too much was set aside, with the first record of each reason.

    Args:
        limit: the recipe's `max_quarantined`.
        total: records of all splits.
        tallies: of the partitions done so far.
        out: folder of the data set, where the table is.
    """
    counts, first = Counter(), {}
    for tally in tallies.values():
        counts.update({reason: n for reason, n in tally.by_reason().items() if reason not in REMOVED})
        first = tally.first | first
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()))
    table = storage.shown(storage.join(out, QUARANTINE_FILE))
    examples = "".join(f"\n  {reason}: {first[reason]}" for reason in sorted(counts))
    return (
        f"{counts.total()} of {total} records were set aside ({reasons}), max_quarantined = {limit:g} allows at most "
        f"{allowed(limit, total)} of {total}. The first of each reason:{examples}\n"
        f"All are in {table} (mlmamba data inspect {storage.shown(out)}). Repair the sources or raise max_quarantined"
    )


def none_left(split: str, tally: Tally) -> str:
    """The message that every record of a split was set aside, with what to do about the most frequent reason."""
    counts = tally.by_reason()
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items())) or "none set aside"
    remedy = f"check data.{split}"
    if counts and max(counts, key=counts.get) == NEAR:
        remedy = "all look like an image of an evaluation set. Raise similar_evaluation_images, or leave it out"
    if counts and max(counts, key=counts.get) == CONTAMINATED:
        remedy = (
            "all show an image of an evaluation set. Take other images, or set exclude_evaluation_images: false (and "
            "leave the set out of exclude_images_of) to train on them all the same"
        )
    first = "".join(f"\n  {reason}: {tally.first[reason]}" for reason in sorted(counts) if reason in tally.first)
    return f"no records are left in the {split} split: {tally.records} were read ({reasons}); {remedy}{first}"


def _shown(row: dict) -> str:
    text = " ".join(f"{row['record_id']} of {row['source']}: {row['detail']}".split())
    return text if len(text) <= _LONGEST_EXAMPLE else f"{text[: _LONGEST_EXAMPLE - 3]}..."


def _detail(removal: Removal, causes: dict[tuple[str, int], str]) -> str:
    if removal.reason == CONTAMINATED:
        return f"image {removal.cause[1]} is one of {removal.cause[0]}"
    if removal.reason == NEAR:
        return f"image {removal.cause[1]} looks like the image of {removal.alike} of {removal.cause[0]}"
    what = "the id of" if removal.reason == DUPLICATE_ID else "the same images and text as"
    return f"{what} {causes[removal.cause]}"
