"""Which tokenized records are not used: those with an id or content that came before, and those with the image of an
evaluation set.

It is decided on one machine between the two passes, from digests that pass 1 left, in the order in which the sources
list the records: the first one stays. So the decision does not depend on how the work was divided. It takes some 130
bytes of memory a record (2 million: 0.3 GB and 7 s).
"""

from dataclasses import dataclass

import numpy as np

from pipelines.exclusion import Excluded
from pipelines.records import Partition
from pipelines.schema import DIGEST_BYTES
from pipelines.tokenize import iter_outcomes

CONTAMINATED, DUPLICATE_ID, DUPLICATE_CONTENT = "contaminated", "duplicate_id", "duplicate_content"
NEAR = "near_contaminated"
_REASONS = (CONTAMINATED, DUPLICATE_ID, DUPLICATE_CONTENT, NEAR)
Alike = dict[str, list[tuple[int, int, int, float]]]
"""As `alike.find_alike` gives it."""
_OF_A_SET = (_REASONS.index(CONTAMINATED), _REASONS.index(NEAR))
_REMOVAL = np.dtype([("owner", "<i4"), ("row", "<i4"), ("reason", "u1"), ("cause_owner", "<i4"), ("cause_row", "<i4")])


@dataclass(frozen=True)
class Removal:
    """Why a tokenized record is not used."""

    reason: str
    cause: tuple[str, int]
    """The earlier record: name of its partition, row in its outcomes. Of a contaminated one: evaluation set, number of
    the record's image."""
    alike: str = ""
    """Of one whose image only looks like another: that one, and how much."""


class Removals:
    """The tokenized records that are not used, by partition and row in the outcomes."""

    def __init__(self):
        self._splits: dict[str, tuple[list[str], list[str], np.ndarray, np.ndarray]] = {}
        self._alike: dict[tuple[str, int], str] = {}

    def add(self, partitions: list[Partition], sets: list[str], removals: np.ndarray) -> None:
        """Take out records of one split.

        Args:
            partitions: the split's, which `owner` counts.
            sets: evaluation sets, which `cause_owner` of a contaminated record counts.
            removals: array of _REMOVAL.
        """
        names = [partition.name for partition in partitions]
        earlier = removals[~np.isin(removals["reason"], _OF_A_SET)]
        causes = np.unique(earlier[["cause_owner", "cause_row"]])
        removals = np.sort(removals, order=["owner", "row"])
        self._splits |= dict.fromkeys(names, (names, sets, removals, causes))

    def of(self, partition: str) -> dict[int, Removal]:
        """The removals of a partition, by row."""
        if partition not in self._splits:
            return {}
        names, sets, removals, _ = self._splits[partition]
        found = {}
        for _, row, reason, owner, cause in _part(removals, "owner", names.index(partition)).tolist():
            of = sets if reason in _OF_A_SET else names
            found[row] = Removal(_REASONS[reason], (of[owner], cause), self._alike.get((partition, row), ""))
        return found

    def add_alike(self, partition: str, row: int, text: str) -> None:
        """Say which image a record's image looks like."""
        self._alike[partition, row] = text

    def causes(self, partition: str) -> set[int]:
        """Rows of a partition that are the reason for a later record's removal."""
        if partition not in self._splits:
            return set()
        names, _, _, causes = self._splits[partition]
        return set(_part(causes, "cause_owner", names.index(partition))["cause_row"].tolist())


def find_removals(
    partitions: list[Partition], work: str, excluded: Excluded, deduplicate: bool, alike: Alike | None = None
) -> Removals:
    """Decide for all splits.

    Args:
        partitions: of all splits, in order, tokenized.
        work: folder of their files.
        excluded: images that the train split must not show.
        deduplicate: whether records of one content are removed; those of one id always are.
        alike: training images that look like one of `excluded`.
    """
    removals = Removals()
    for split in dict.fromkeys(partition.split for partition in partitions):
        own = [partition for partition in partitions if partition.split == split]
        sets = list(excluded.counts) if split == "train" else []
        near = (alike or {}) if sets else {}
        removals.add(own, sets, _decide(own, work, excluded if sets else Excluded(), deduplicate, near))
        for name, found in near.items():
            for row, _, twin, much in reversed(found):  # the first image of a record is told
                removals.add_alike(name, row, f"{excluded.twins[twin][1]} ({much:.2f})")
    return removals


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """For each row of an array (n, 2), the index of the first row that is equal: its own where it is the first."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal rows stay in their order
    ranked = keys[order]
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    group = np.maximum.accumulate(np.where(starts, np.arange(len(keys)), 0))
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = order[group]
    return first


def _decide(partitions: list[Partition], work: str, excluded: Excluded, deduplicate: bool, alike: Alike) -> np.ndarray:
    """The removals of one split, as an array of _REMOVAL."""
    owners, rows, ids, contents = [], [], [], []
    removed = []
    columns = ["reason", "id", "content", *(["digests"] if excluded else [])]
    for owner, (partition, outcomes) in enumerate(iter_outcomes(partitions, work, columns)):
        usable = outcomes["reason"].is_null().to_numpy().copy()
        if excluded:
            found = _contaminated(outcomes["digests"].combine_chunks(), excluded)
            removed += [(owner, row, _REASONS.index(CONTAMINATED), *cause) for row, cause in found.items()]
            usable[list(found)] = False
            near = {row: (excluded.twins[twin][0], n) for row, n, twin, _ in reversed(alike.get(partition.name, []))}
            near = {row: cause for row, cause in near.items() if usable[row]}
            removed += [(owner, row, _REASONS.index(NEAR), *cause) for row, cause in near.items()]
            usable[list(near)] = False
        place = np.flatnonzero(usable)
        owners.append(np.full(len(place), owner, dtype=np.int32))
        rows.append(place.astype(np.int32))
        ids.append(_numbers(outcomes["id"])[place])
        contents.append(_numbers(outcomes["content"])[place])
    owner, row, record, content = (np.concatenate(parts) for parts in (owners, rows, ids, contents))
    del owners, rows, ids, contents
    results = [np.array(removed, dtype=_REMOVAL)]
    left = np.arange(len(owner))
    for reason, keys in ((DUPLICATE_ID, record), (DUPLICATE_CONTENT, content))[: 2 if deduplicate else 1]:
        first = first_of_each(keys[left])
        later = first != np.arange(len(left))
        one, cause = left[later], left[first[later]]
        result = np.empty(len(one), dtype=_REMOVAL)
        result["owner"], result["row"], result["reason"] = owner[one], row[one], _REASONS.index(reason)
        result["cause_owner"], result["cause_row"] = owner[cause], row[cause]
        results.append(result)
        left = left[~later]
    return np.concatenate(results)


def _contaminated(images, excluded: Excluded) -> dict[int, tuple[int, int]]:
    """Rows with an excluded image: index of the set, and the number of the first such image in its record."""
    lengths = images.value_lengths().fill_null(0).to_numpy()
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    before = np.cumsum(lengths) - lengths
    found = {}
    for place, number in excluded.find(images.flatten()):
        row = int(row_of[place])
        found.setdefault(row, (number, place - int(before[row]) + 1))
    return found


def _numbers(column) -> np.ndarray:
    """Digests as two unsigned numbers each, (n, 2)."""
    array = column.combine_chunks()
    data = np.frombuffer(array.buffers()[1], dtype=np.uint8)[array.offset * DIGEST_BYTES :]
    return data[: len(array) * DIGEST_BYTES].view("<u8").reshape(-1, 2)


def _part(array: np.ndarray, field: str, value: int) -> np.ndarray:
    """The rows of an array, sorted by a field, in which that field has a value."""
    first, last = np.searchsorted(array[field], [value, value + 1])
    return array[first:last]
