"""The plan of the shards: by segments of the shuffle, whatever the groups of partitions."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines import plan, storage
from pipelines.plan import plan_segment, read_plan
from pipelines.planner import plan_rows

SAMPLES, MAX_TOKENS, SEED = 5000, 512, 3


@pytest.fixture
def planned(tmp_path):
    """A function that settles samples in groups of some sizes, plans them in segments, and gives rows of samples."""
    lengths = np.random.default_rng(0).integers(16, 400, SAMPLES).astype(np.int32)
    owners = np.repeat(np.arange(50, dtype=np.int32), 100)
    places = np.tile(np.arange(100, dtype=np.int32), 50)

    def run(ends: list[int], segments: int, digests: str = "d"):
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            named = f'["{digests}"' + f', "{digests}"' * ((end - start) // 100 - 1) + "]"
            schema = plan._SAMPLES.with_metadata({"mlmamba.digests": named})
            table = pa.table([column[start:end] for column in (owners, places, lengths)], schema=schema)
            storage.write_table(str(tmp_path / f"settled/train-{number:05d}.arrow"), table)
        rows, shards = [], []
        for segment in range(segments):
            task = {"split": "train", "groups": len(ends), "segments": segments, "segment": segment, "seed": SEED}
            task |= {"work": str(tmp_path), "max_tokens": MAX_TOKENS, "rows": 7, "file": str(tmp_path / "plan.arrow")}
            found = plan_segment(task)["shards"]
            for batch, (count, digest) in enumerate(found):
                own = read_plan(task["file"], batch)
                assert len(own) == count <= 7
                rows += [(row[:, 0] * 100 + row[:, 1]).tolist() for row in own]
                shards.append(digest)
        return rows, shards, lengths

    return run


def test_one_segment_is_the_plan_of_all(planned):
    rows, shards, lengths = planned([SAMPLES], 1)
    assert rows == [row.tolist() for row in plan_rows(lengths, MAX_TOKENS, SEED)]
    assert len({*shards}) == len(shards)
    assert not {*planned([SAMPLES], 1, "other")[1]} & {*shards}


@pytest.mark.parametrize("segments", [1, 3])
def test_groups_do_not_matter(planned, segments):
    rows, shards, _ = planned([SAMPLES], segments)
    assert planned([100, 2500, SAMPLES], segments)[:2] == (rows, shards)


def test_several_segments_hold_every_sample_once_in_full_rows(planned):
    rows, _, lengths = planned([SAMPLES], 3)
    assert sorted(sample for row in rows for sample in row) == [*range(SAMPLES)]
    filled = [lengths[row].sum() for row in rows]
    assert max(filled) <= MAX_TOKENS
    assert sum(filled) > 0.95 * MAX_TOKENS * len(rows)
