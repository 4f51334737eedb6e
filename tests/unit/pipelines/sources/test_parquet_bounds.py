"""Parquet files of some hundred bytes that stand for gigabytes: their rows are set aside, and memory stays bounded."""

import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.source_config import ParquetSource
from pipelines.sources import open_source
from pipelines.sources.parquet_bounds import characters, most_text, no_images

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def source(path, **fields):
    return open_source(ParquetSource(**({"type": "parquet", "files": str(path), "caption": "caption"} | fields)))


def repeated(text: str, rows: int) -> pa.Array:
    """A column that stores its one value once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [text])


def test_one_value_of_many_rows(tmp_path):
    table = pa.table({"caption": repeated("a" * 1_000_000, 2000)})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", write_statistics=False, store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 500
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    listed, problem = 0, None
    for record in source(tmp_path / "a.parquet", image=None).records():
        listed += record.problem is None
        problem = record.problem or problem
    assert listed < 100
    assert problem.reason == "shard_damaged"
    assert "its text is over 1,000 times as long as the file" in problem.detail
    assert problem.lost / problem.of > 0.3
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    )  # kilobytes; unfolded it takes 2 million


def test_rows_that_take_no_bytes(tmp_path):
    pq.write_table(
        pa.table({"caption": pa.nulls(3_000_000, pa.string())}), tmp_path / "a.parquet", row_group_size=3_000_000
    )
    (record,) = source(tmp_path / "a.parquet", image=None).records()
    assert record.problem.reason == "shard_damaged"
    assert "it claims 3,000,000 rows in a file of" in record.problem.detail


def test_a_column_that_unfolds(tmp_path):
    table = pa.table({"caption": ["a" * 100_000_000, "b"]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False, write_statistics=False)
    (record,) = source(tmp_path / "a.parquet", image=None).records()
    assert "column caption unfolds to 100,0" in record.problem.detail


def test_a_long_text_costs_its_row_and_repeated_captions_are_fine(tmp_path):
    captions = pa.array(["good", "x" * 17_000_000, "good"])
    pq.write_table(pa.table({"caption": captions}), tmp_path / "a.parquet", compression="none")
    problems = [
        record.problem and record.problem.reason for record in source(tmp_path / "a.parquet", image=None).records()
    ]
    assert problems == [None, "malformed", None]
    images = pa.array([{"bytes": str(i).encode() * 20, "path": None} for i in range(5000)], IMAGE)
    table = pa.table({"image": images, "caption": repeated("A photograph of it.", 5000)})
    pq.write_table(table, tmp_path / "b.parquet")
    records = list(source(tmp_path / "b.parquet").records())
    assert len(records) == 5000
    assert not any(record.problem for record in records)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (pa.binary(), None),
        (IMAGE, None),
        (pa.list_(IMAGE), None),
        (pa.string(), "text"),
        (pa.list_(pa.string()), "text"),
        (pa.struct([("path", pa.string())]), "objects of path"),
        (pa.int64(), "values of type int64"),
    ],
)
def test_types_of_image_columns(kind, what):
    assert no_images(kind) == what


def test_counting():
    assert characters({"a": "xy", "b": [{"c": "z"}, None, 3]}) == 3
    assert most_text(1) < most_text(1_000_000) < 2e9
