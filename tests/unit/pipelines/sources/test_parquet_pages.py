"""Headers of Parquet pages: every page of what pyarrow writes is found, and pages that claim more than the footer."""

import random
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.source_config import ParquetSource
from pipelines.sources import open_source, parquet_bounds
from pipelines.sources.parquet_pages import pages

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
OPTIONS = [
    {"compression": "none", "data_page_version": "2.0", "use_dictionary": False},
    {"compression": "zstd", "data_page_version": "1.0"},
    {"compression": "snappy", "write_statistics": False, "write_page_checksum": True},
    {"compression": "gzip", "data_page_version": "2.0", "write_page_index": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_page_that_pyarrow_writes(tmp_path, options):
    rng = random.Random(0)
    rows = 20_000
    table = pa.table(
        {
            "caption": [("w" * rng.randrange(9000) if i % 999 == 0 else f"text {i}") for i in range(rows)],
            "chat": [[{"role": "user", "content": str(i)}] * (i % 3) for i in range(rows)],
            "image": pa.array([{"bytes": b"x" * (i % 50), "path": None} for i in range(rows)], IMAGE),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", data_page_size=4096, row_group_size=7000, **options)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.parquet")) as file:
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                found = list(pages(file, column))
                assert sum(page.size for page in found) <= column.total_uncompressed_size
                assert sum(page.packed for page in found) <= column.total_compressed_size
                dictionary = found[0].values if column.dictionary_page_offset else 0
                assert sum(page.values for page in found) - dictionary == column.num_values
                assert len(found) > 3 or column.path_in_schema != "caption"
    records = list(open_source(ParquetSource(type="parquet", files=str(tmp_path / "*"), caption="caption")).records())
    assert len(records) == rows
    assert not any(record.problem for record in records)


def test_noise_is_no_header(tmp_path):
    pq.write_table(pa.table({"caption": ["a", "b"]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    column = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0)
    rng = random.Random(1)
    for _ in range(300):
        at = rng.randrange(4, 4 + column.total_compressed_size)
        damaged = whole[:at] + rng.randbytes(3) + whole[at + 3 :]
        try:
            found = list(pages(pa.BufferReader(damaged), column))
        except ValueError:
            continue
        assert sum(page.packed for page in found) <= column.total_compressed_size


def number(value: int, length: int = 0) -> bytes:
    """A number as Thrift writes it, in no fewer bytes than `length`."""
    value, out = value << 1, b""
    while value > 127 or length > len(out) + 1:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def lie(path, *values: int) -> None:
    """Make the footer say 5 for these numbers, and leave the pages as they are."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[-8:-4], "little")
    start, footer = whole[: -8 - size], whole[-8 - size :]
    for value in values:
        assert number(value) in footer
        footer = footer.replace(number(value), number(5, len(number(value))))
    path.write_bytes(start + footer)


def caption_source(path, **fields):
    return open_source(ParquetSource(type="parquet", files=str(path), **fields))


def test_a_page_that_unfolds_to_more_than_the_footer_says(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"caption": ["a" * 100_000_000, "b"]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    lie(path, pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (record,) = caption_source(path, image=None, caption="caption").records()
    assert record.problem.reason == "shard_damaged"
    assert "pages of column caption unfold to 100,0" in record.problem.detail
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_list_that_claims_more_values_than_the_file_has_bits(tmp_path):
    path, count = tmp_path / "a.parquet", 3_000_000
    chat = pa.array([[None] * count], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))
    pq.write_table(pa.table({"chat": chat}), path, compression="zstd")
    for told in ("in the footer", "in the pages alone"):
        (record,) = caption_source(path, image=None, conversation="chat").records()
        assert "claims 3,000,000 values in a file of" in record.problem.detail, told
        if told == "in the footer":
            lie(path, count)


def test_an_image_column_whose_pages_lie_costs_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_bounds, "_SMALL", 1 << 20)
    path = tmp_path / "a.parquet"
    images = pa.array([{"bytes": b"\0" * 20_000_000, "path": None}, {"bytes": b"x", "path": None}], IMAGE)
    table = pa.table({"image": images, "caption": ["one", "two"]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    lie(path, pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size)
    source = caption_source(path, caption="caption")
    records = list(source.records())
    assert not any(record.problem for record in records)
    for record in records:
        with pytest.raises(ValueError, match=r"pages of column image\.bytes unfold to 20,0"):
            source.read_image(record.images[0])
