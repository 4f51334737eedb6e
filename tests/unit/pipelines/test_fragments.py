"""The partitions of a split hold what its sources list, whatever limits, weights and numbers ask for."""

import json

import pytest

from pipelines import fragments
from pipelines.fragments import cut_sources, partitions
from pipelines.source_config import LlavaSource, ParquetSource, WebDatasetSource
from pipelines.sources import open_source
from tests.helpers.corpora import conversation, write_files, write_parquet, write_tar
from tests.helpers.images import encoded


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """What runs as Ray tasks runs here, in another order."""

    def run(function, tasks, name=""):
        for task in reversed(list(tasks)):
            yield function(json.loads(json.dumps(task)))

    monkeypatch.setattr(fragments, "run_tasks", run)
    monkeypatch.setattr(fragments.ray, "cluster_resources", lambda: {"CPU": 1})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Some 2,600 records in JSON of which many have one id, tars and tables whose captions are lists."""
    root = tmp_path_factory.mktemp("corpus")
    made = [{"id": f"r{i % 900}", "conversations": conversation(f"q {i}", f"a {i}")} for i in range(2600)]
    write_files(root, {"a.json": made})
    for shard in range(7):
        members = []
        for i in range(5):
            members += [
                (f"{i}.png", encoded(i)),
                (f"{i}.json", json.dumps({"c": ["one", "two", "three"][: 1 + i % 3]})),
            ]
        write_tar(root / f"s-{shard}.tar", members)
    write_parquet(root / "a.parquet", {"c": [["a", "b"], ["c"]] * 50}, rows=20)
    return root


def configs(root, **changes):
    return [
        LlavaSource(type="llava", annotations=str(root / "a.json"), **changes),
        WebDatasetSource(type="webdataset", shards=str(root / "s-*.tar"), caption="json.c", **changes),
        ParquetSource(type="parquet", files=str(root / "a.parquet"), image=None, caption="c", **changes),
    ]


CHANGES = [
    {},
    {"limit": 7},
    {"limit": 2000, "weight": 2},
    {"weight": 0.29},
    {"weight": 2.5, "limit": 11},
    {"repeated_ids": "number"},
    {"repeated_ids": "number", "weight": 1.7, "limit": 1500, "seed": 3},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("size", [100, 5000])
def test_partitions_hold_what_the_sources_list(corpus, tmp_path, changes, size):
    own = configs(corpus, **changes)
    cuts = cut_sources({f"train-{i}": config for i, config in enumerate(own)}, size, str(tmp_path))
    made = list(partitions("train", list(cuts.values()), "settings"))
    assert [partition.index for partition in made] == [*range(len(made))]
    readers = {config.label: open_source(config) for config in own}
    read = [list(partition.read(readers[partition.source])) for partition in made]
    assert [record for part in read for record in part] == [r for config in own for r in open_source(config).records()]
    assert all(partition.records in (None, len(part)) for partition, part in zip(made, read, strict=True))
    assert max(len(part) for partition, part in zip(made, read, strict=True) if partition.source == "llava") <= size
    assert len({partition.digest for partition in made}) == len(made)


def test_a_digest_changes_with_what_a_partition_holds_alone(corpus, tmp_path):
    def digests(settings="settings", **changes):
        cuts = cut_sources({"train-0": configs(corpus, **changes)[0]}, 100, str(tmp_path))
        return [partition.digest for partition in partitions("train", [cuts["train-0"]], settings)]

    whole = digests()
    assert digests(limit=250)[:2] == whole[:2]
    assert digests(limit=250)[2] != whole[2]
    assert digests(weight=2)[: len(whole)] == whole
    assert not {*digests("others")} & {*whole}
    assert not {*digests(system="drop")} & {*whole}


def test_no_more_shards_are_listed_than_a_limit_asks_for(corpus, tmp_path, monkeypatch):
    listed = []
    count = fragments.list_fragments
    monkeypatch.setattr(fragments, "list_fragments", lambda task: listed.append(task["number"]) or count(task))
    cut_sources({"train-0": configs(corpus, limit=5)[1]}, 100, str(tmp_path))
    assert sorted(listed) == [0, 1, 2, 3]


def test_a_source_that_is_split_has_partitions_on_both_sides_and_counts_its_records_once(corpus, tmp_path):
    (config, *_), (plain, *_) = configs(corpus, validation=0.2, weight=2), configs(corpus, weight=2)
    made = {}
    for name, own in (("split", config), ("plain", plain)):
        (cut,) = cut_sources({"train-0": own}, 500, str(tmp_path / name)).values()
        made[name] = {split: list(partitions(split, [cut], "settings")) for split in ("train", "validation")}
    train, held = made["split"]["train"], made["split"]["validation"]
    assert len(held) * 2 == len(train)  # not once more for the weight
    assert sum(partition.records for partition in train) == 5200
    assert {partition.records for partition in held} == {0}
    digests = [partition.digest for partition in [*train, *held, *made["plain"]["train"]]]
    assert len(digests) == len({*digests})
