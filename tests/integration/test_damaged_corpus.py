"""A thousand damaged records of many kinds, in five layouts among good ones, through the whole preparation on a real
Ray: every one is set aside for the right reason, every good one is kept."""

from collections import Counter

import pytest

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.prepare import prepare
from pipelines.reader import PackedDataset
from pipelines.validate import REASONS
from tests.helpers.bad_input import BadInput

GOOD, EACH = 150, 8

pytestmark = pytest.mark.usefixtures("two_cpus")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> BadInput:
    return BadInput(tmp_path_factory.mktemp("corpus"), GOOD, EACH)


def config(corpus: BadInput, **changes) -> DataConfig:
    settings = {"train": corpus.sources, "test": [corpus.test], "tokenizer": {"train_vocab_size": 400}}
    sizes = {"max_tokens": 256, "partition_records": 100, "shard_rows": 50, "max_quarantined": 1}
    return DataConfig(**(settings | sizes | changes))


def test_every_damaged_record_is_set_aside_for_its_reason_and_every_good_one_kept(corpus, tmp_path):
    out = str(tmp_path / "set")
    manifest = prepare(config(corpus), out, tokens_per_image=4, seed=0)
    damaged = {key: reason for key, reason in corpus.expected.items() if reason}
    good = {key for key, reason in corpus.expected.items() if not reason}
    assert len(damaged) >= 1000
    assert len(corpus.kinds) >= 12
    assert {*damaged.values()} == {*REASONS} - {"shard_damaged", "near_contaminated"}  # the latter only where asked for

    table = storage.open_arrow(f"{out}/quarantine.arrow").read_all().to_pylist()
    again = Counter()
    found = {}
    for row in table:
        again[row["source"], row["record_id"]] += 1
        name = f"{row['record_id']} again" if row["reason"] == "duplicate_id" else row["record_id"]
        found[row["source"], name] = row["reason"]
        assert row["detail"], row
    assert {key: (found.get(key), reason) for key, reason in damaged.items() if found.get(key) != reason} == {}
    assert found.keys() == damaged.keys()
    assert max(again.values()) == 1

    rows = PackedDataset(out)
    kept = Counter()
    for i in range(len(rows)):
        kept.update(zip(rows[i].source, rows[i].sample_ids, strict=True))
    assert {*kept} == good
    assert max(kept.values()) == 1
    split = manifest.splits["train"]
    assert split.records == len(damaged) + len(good)
    assert split.quarantined == dict(sorted(Counter(damaged.values()).items()))
    by_source = {source: Counter() for source, _ in damaged}
    for (source, _), reason in damaged.items():
        by_source[source][reason] += 1
    assert split.quarantined_by_source == {name: dict(counts) for name, counts in by_source.items()}


def test_too_much_of_it_stops_the_run_early(corpus, tmp_path):
    from pipelines.prepare import PrepareError

    with pytest.raises(PrepareError, match=r"were set aside \(.*max_quarantined = 0\.01 allows at most"):
        prepare(config(corpus, max_quarantined=0.01), str(tmp_path / "set"), tokens_per_image=4, seed=0)
