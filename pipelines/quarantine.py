"""The table of records that were set aside, what became of all records by source, and the limit on bad ones."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.dedup import CONTAMINATED, NEAR
from pipelines.schema import QUARANTINE
from pipelines.tokenize import iter_outcomes
from pipelines.validate import REMOVED

QUARANTINE_FILE = "quarantine.arrow"
_LONGEST_EXAMPLE = 300  # characters of a record in a message
_COLUMNS = ["record_id", "source", "length", "images", "cut_turns", "reason", "detail"]


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

    def to_json(self) -> dict:
        """The same as plain data."""
        counts = [[*key, count] for key, count in self.quarantined.items()]
        return vars(self) | {"quarantined": counts}

    def add(self, fields: dict) -> None:
        """Add what `to_json` gave of records that come after these."""
        for source, reason, count in fields["quarantined"]:
            self.quarantined[source, reason] += count
        for name in ("records", "cut", "cut_turns", "without_images"):
            setattr(self, name, getattr(self, name) + fields[name])
        self.first = fields["first"] | self.first


_BATCH = 1000  # records


class Settled(NamedTuple):
    """What became of the records of a group of partitions."""

    tally: Tally
    bad: list[dict]
    """Rows of the quarantine table."""
    samples: dict[str, np.ndarray]
    """Of every sample that is used, in order: `owner` (its partition's number), `place` (its record batch in that token
    file) and `length`, int32."""


def settle(split: str, first: int, names: list[str], work: str, removed: pa.Table) -> Settled:
    """Put together what became of the records of some partitions.

    Args:
        split: that they are of.
        first: number of the first one in the split.
        names: of the partitions, in order, tokenized.
        work: folder of their files.
        removed: tokenized records that are not used (dedup.REMOVED).
    """
    tally, bad = Tally(), []
    samples: dict[str, list[np.ndarray]] = {"owner": [], "place": [], "length": []}
    removals: dict[int, dict[int, dict]] = defaultdict(dict)
    for row in removed.to_pylist():
        removals[row["owner"]][row["row"]] = row
    for owner, (_, outcomes) in enumerate(iter_outcomes(names, work, _COLUMNS), first):
        own = removals.get(owner, {})
        tokenized = outcomes["reason"].is_null().to_numpy()
        used = tokenized.copy()
        used[list(own)] = False
        tally.records += outcomes.num_rows
        tally.without_images += int((used & (outcomes["images"].to_numpy() == 0)).sum())
        told = np.flatnonzero(~used | (outcomes["cut_turns"].to_numpy() > 0))
        for i, row in zip(told.tolist(), outcomes.take(pa.array(told, pa.int64())).to_pylist(), strict=True):
            if i in own:
                row |= {name: own[i][name] for name in ("reason", "detail")}
            if row["reason"]:
                bad.append({"split": split} | {name: row[name] for name in QUARANTINE.names[1:]})
                tally.quarantined[row["source"], row["reason"]] += 1
                tally.first.setdefault(row["reason"], _shown(row))
            else:
                tally.cut += 1
                tally.cut_turns += row["cut_turns"]
        samples["owner"].append(np.full(used.sum(), owner, dtype=np.int32))
        samples["place"].append((np.cumsum(tokenized) - 1)[used].astype(np.int32))
        samples["length"].append(outcomes["length"].to_numpy()[used])
    empty = np.zeros(0, dtype=np.int32)
    return Settled(tally, bad, {name: np.concatenate([empty, *parts]) for name, parts in samples.items()})


def write_quarantine(uri: str, parts: Iterable[list[dict]]) -> None:
    """Write the table of the records that are not used, in the order of the sources."""
    with (
        storage.atomic_file(uri) as path,
        pa.OSFile(path, "wb") as sink,
        pa.ipc.new_file(sink, QUARANTINE) as writer,
    ):
        rows = chain.from_iterable(parts)
        while batch := list(islice(rows, _BATCH)):  # of one size, so that the same table is the same file
            writer.write_table(pa.Table.from_pylist(batch, schema=QUARANTINE))


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
    if not tally.records:
        remedy += ", and `validation` of the training sources: the share of their images that it takes"
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
