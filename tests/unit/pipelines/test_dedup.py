"""Which tokenized records are not used, decided from digests: no Ray, no images."""

import json

import numpy as np
import pyarrow as pa
import pytest

from pipelines import dedup, plan, storage
from pipelines.dedup import find_removals, first_of_each
from pipelines.exclusion import Excluded
from pipelines.plan import plan_shards, read_bad, read_plan, settle_groups
from pipelines.quarantine import write_quarantine
from pipelines.records import groups_of, name_of, outcomes_file
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
def decided(tmp_path, monkeypatch):
    """A function that writes the records' outcomes in partitions of some size, decides, and settles.

    What runs as Ray tasks runs here one after the other, in an order of its own.
    """
    work = str(tmp_path)

    def run(function, tasks, name=""):
        for task in reversed(list(tasks)):
            yield function(json.loads(json.dumps(task)))

    for module in (dedup, plan):
        monkeypatch.setattr(module, "run_tasks", run)

    def write(size: int, split: str) -> int:
        for index, start in enumerate(range(0, len(RECORDS), size)):
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
                for name, content, images in RECORDS[start : start + size]
            ]
            schema = OUTCOMES.with_metadata({"mlmamba.digest": f"{split}{index}"})
            storage.write_table(outcomes_file(work, name_of(split, index)), pa.Table.from_pylist(columns, schema))
        return index + 1

    def decide(size: int, excluded: Excluded, splits=("train",), deduplicate=True, group=256, bucket=1 << 21):
        monkeypatch.setattr(dedup, "_BUCKET", bucket)
        groups = {split: list(groups_of(split, write(size, split), group)) for split in splits}
        records = dict.fromkeys(splits, len(RECORDS))
        search = find_removals(groups, records, work, excluded, deduplicate)
        return groups, settle_groups(groups, search, work), [row for part in read_bad(groups, work) for row in part]

    return decide


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


@pytest.mark.parametrize(("group", "bucket"), [(256, 1 << 21), (2, 5), (1, 1)])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_the_decision_does_not_depend_on_partitions_groups_and_buckets(
    decided, excluded, tmp_path, size, group, bucket
):
    groups, tallies, bad = decided(size, excluded, group=group, bucket=bucket)
    write_quarantine(str(tmp_path / "quarantine.arrow"), read_bad(groups, str(tmp_path)))
    table = storage.open_arrow(str(tmp_path / "quarantine.arrow")).read_all().to_pylist()
    assert table == bad
    expected = {1: ("empty_turn", "it is")} | REMOVED
    assert [(row["record_id"], row["reason"], row["detail"]) for row in table] == [
        (RECORDS[i][0], *expected[i]) for i in sorted(expected)
    ]
    tally = tallies["train"]
    assert (tally.records, tally.bad, tally.cut, tally.cut_turns, tally.without_images) == (12, 3, 1, 1, 4)
    assert tally.by_reason() == {"contaminated": 2, "duplicate_content": 3, "duplicate_id": 2, "empty_turn": 1}
    assert tally.by_source() == {"s": tally.by_reason()}
    assert tally.first["duplicate_id"] == "c of s: the id of c of s"

    (shard,) = plan_shards(groups, {"train": 4}, 10, 100, 0, str(tmp_path))["train"]  # a sample fills a row
    rows = read_plan(shard.file, shard.batch)
    assert shard.rows == len(rows) == 4
    places = sorted(tuple(place) for row in rows for place in row.tolist())
    usable = [i for i in range(12) if RECORDS[i][1] is not None]
    batches = {i: sum(other // size == i // size for other in usable if other < i) for i in usable}
    assert places == sorted((i // size, batches[i]) for i in usable if i not in REMOVED)


def test_without_deduplication_only_ids_count(decided):
    _, tallies, _ = decided(5, Excluded(), deduplicate=False)
    assert tallies["train"].by_reason() == {"duplicate_id": 2, "empty_turn": 1}


@pytest.mark.parametrize("group", [1, 256])
def test_splits_are_by_themselves_and_only_training_is_kept_clean(decided, excluded, group):
    _, tallies, bad = decided(5, excluded, ("train", "validation"), group=group)
    assert tallies["train"].by_reason()["contaminated"] == 2
    assert tallies["validation"].by_reason() == {"duplicate_content": 4, "duplicate_id": 2, "empty_turn": 1}
    assert [row["split"] for row in bad] == ["train"] * 8 + ["validation"] * 7


def test_an_image_of_two_sets_is_counted_once(excluded):
    assert excluded.counts == {"validation/t": 2, "test/t": 1}
    assert not Excluded()


def test_a_digest_tells_its_parts_apart():
    assert digest(b"ab", b"c") != digest(b"a", b"bc") != digest(b"abc")
    assert len(digest()) == DIGEST_BYTES
