"""Columns of every Arrow file the pipelines write, and how one row becomes one record batch.

Token files and shards hold one row per record batch. It costs about half a kilobyte a row, and lets a reader fetch
exactly the rows it wants: from a memory map without searching, from an object store without reading neighbours.
"""

import pyarrow as pa

_INTS = pa.list_(pa.int32())
_BYTES = pa.list_(pa.binary())

# One tokenized record. `images` are encoded files; decoded pixels never enter a block or a file.
TOKENS = pa.schema(
    [
        ("record_id", pa.string()),
        ("source", pa.string()),
        ("input_ids", _INTS),
        ("labels", _INTS),
        ("image_positions", _INTS),
        ("images", _BYTES),
    ]
)

# What became of each record of a partition, in order. `reason` is null for those that are in the token file.
OUTCOMES = pa.schema(
    [
        ("record_id", pa.string()),
        ("source", pa.string()),
        ("length", pa.int32()),
        ("images", pa.int32()),
        ("cut", pa.bool_()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

# The table of records that were set aside, for people to read.
QUARANTINE = pa.schema([(name, pa.string()) for name in ("split", "record_id", "source", "reason", "detail")])

# One packed training row: several samples, one after the other. All positions count from the start of the row.
PACKED = pa.schema(
    [
        ("sample_ids", pa.list_(pa.string())),
        ("input_ids", _INTS),
        ("labels", _INTS),
        ("seq_idx", _INTS),
        ("images", _BYTES),
        ("image_positions", _INTS),
        ("source", pa.list_(pa.string())),
    ]
)


def one_row(schema: pa.Schema, row: dict) -> pa.RecordBatch:
    """A record batch of one row. Values of list columns may be lists or numpy arrays."""
    return pa.record_batch([pa.array([row[field.name]], field.type) for field in schema], schema=schema)


def values(batch: pa.RecordBatch, column: str) -> pa.Array:
    """The elements of a list column of a one-row batch, without a copy."""
    return batch.column(column).flatten()
