"""Which tokenized records are not used, decided from digests: no Ray, no images."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.dedup import Removals, find_removals, first_of_each
from pipelines.exclusion import Excluded
from pipelines.pack import shard_tasks
from pipelines.quarantine import write_quarantine
from pipelines.records import Partition
from pipelines.schema import DIGEST_BYTES, OUTCOMES, digest

# record id, content, images; None for content: set aside in pass 1.
RECORDS = [
    ("a", "x", ["p1"]),
    ("b", None, []),
    ("c", "y", ["p2", "p3"]),
    ("d", "x", ["p1"]),  # content of a
    ("b", "z", []),  # the first b is not used
    ("c", "w", ["p4"]),  # id of c
    ("e", "y", ["p2", "p3"]),  # content of c
    ("f", "v", ["p5", "p6"]),  # p6 is of an evaluation set
    ("g", "v", ["p5", "p6"]),
    ("b", "u", []),  # id of the second b
    ("h", "w", ["p4"]),  # content of the second c, which is not used
    ("i", "x", ["p1"]),  # content of a
]
REMOVED = {
    3: ("duplicate_content", "the same images and text as a of s"),
    5: ("duplicate_id", "the id of c of s"),
    6: ("duplicate_content", "the same images and text as c of s"),
    7: ("contaminated", "image 2 is one of test/t"),
    8: ("contaminated", "image 2 is one of test/t"),
    9: ("duplicate_id", "the id of b of s"),
    11: ("duplicate_content", "the same images and text as a of s"),
}


@pytest.fixture
def partitions(tmp_path):
    """A function that writes the records' outcomes in partitions of some size, for a split."""

    def write(size: int, split: str = "train") -> list[Partition]:
        made = []
        for index, start in enumerate(range(0, len(RECORDS), size)):
            rows = RECORDS[start : start + size]
            partition = Partition(split, index, len(rows), f"{split}{index}")
            columns = [
                {"record_id": name, "source": "s", "length": 10, "images": 0, "cut_turns": int(name == "h")}
                | (
                    {"reason": "empty_turn", "detail": "it is"}
                    if content is None
                    else {
                        "id": digest(name.encode()),
                        "content": digest(content.encode()),
                        "digests": [digest(image.encode()) for image in images],
                    }
                )
                for name, content, images in rows
            ]
            storage.write_table(partition.outcomes_file(str(tmp_path)), pa.Table.from_pylist(columns, OUTCOMES))
            made.append(partition)
        return made

    return write


@pytest.fixture
def excluded():
    found = Excluded()
    found.add("validation/t", pa.array([digest(b"p9"), digest(b"p8")], pa.binary(DIGEST_BYTES)))
    found.add("test/t", pa.array([digest(b"p6"), digest(b"p9"), digest(b"p6")], pa.binary(DIGEST_BYTES)))
    return found


def test_first_of_each():
    keys = np.array([[1, 2], [2, 1], [1, 2], [1, 1], [2, 1], [1, 2]], dtype=np.uint64)
    assert first_of_each(keys).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_of_each(keys[:0]).tolist() == []
    many = np.random.default_rng(0).integers(0, 50, (5000, 2)).astype(np.uint64)
    seen: dict[tuple, int] = {}
    assert first_of_each(many).tolist() == [seen.setdefault(tuple(key), i) for i, key in enumerate(many.tolist())]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_the_decision_does_not_depend_on_the_partitions(partitions, excluded, tmp_path, size):
    made = partitions(size)
    removals = find_removals(made, str(tmp_path), excluded, deduplicate=True)
    tallies = write_quarantine(str(tmp_path), str(tmp_path), made, removals)
    table = storage.open_arrow(str(tmp_path / "quarantine.arrow")).read_all().to_pylist()
    expected = {1: ("empty_turn", "it is")} | REMOVED
    assert [(row["record_id"], row["reason"], row["detail"]) for row in table] == [
        (RECORDS[i][0], *expected[i]) for i in sorted(expected)
    ]
    tally = tallies["train"]
    assert (tally.records, tally.bad, tally.cut, tally.cut_turns) == (12, 3, 1, 1)
    assert tally.by_reason() == {"contaminated": 2, "duplicate_content": 3, "duplicate_id": 2, "empty_turn": 1}
    assert tally.by_source() == {"s": tally.by_reason()}

    tasks = shard_tasks(made, 10, 100, 0, str(tmp_path), "", removals)  # a sample fills a row: one row each
    names = [file.split("train-")[1].removesuffix(".arrow") for file in tasks[0]["tokens"]]
    places = sorted((int(names[file]), batch) for ((file, batch),) in tasks[0]["rows"])
    usable = [i for i in range(12) if RECORDS[i][1] is not None]
    batches = {i: sum(other // size == i // size for other in usable if other < i) for i in usable}
    assert places == sorted((i // size, batches[i]) for i in usable if i not in REMOVED)


def test_without_deduplication_only_ids_count(partitions, tmp_path):
    made = partitions(5)
    removals = find_removals(made, str(tmp_path), Excluded(), deduplicate=False)
    found = {
        5 * partition.index + row: r.reason for partition in made for row, r in removals.of(partition.name).items()
    }
    assert found == {5: "duplicate_id", 9: "duplicate_id"}


def test_splits_are_by_themselves_and_only_training_is_kept_clean(partitions, excluded, tmp_path):
    made = [*partitions(5), *partitions(5, "validation")]
    removals = find_removals(made, str(tmp_path), excluded, deduplicate=True)
    tallies = write_quarantine(str(tmp_path), str(tmp_path), made, removals)
    assert tallies["train"].by_reason()["contaminated"] == 2
    assert tallies["validation"].by_reason() == {"duplicate_content": 4, "duplicate_id": 2, "empty_turn": 1}


def test_an_image_of_two_sets_is_counted_once(excluded):
    assert excluded.counts == {"validation/t": 2, "test/t": 1}
    assert not Excluded()


def test_nothing_removed():
    assert Removals().of("train-00000") == {}
    assert Removals().causes("train-00000") == set()


def test_a_digest_tells_its_parts_apart():
    assert digest(b"ab", b"c") != digest(b"a", b"bc") != digest(b"abc")
    assert len(digest()) == DIGEST_BYTES
