"""Columns of every Arrow file the pipelines write, and how one row becomes one record batch.

Token files and shards hold one row per record batch. It costs about half a kilobyte a row, and lets a reader fetch
exactly the rows it wants: from a memory map without searching, from an object store without reading neighbours.
"""

import hashlib

import pyarrow as pa

# Of the columns of PACKED. A reader of one version does not read another.
PACKED_VERSION = 1
# Of what pass 1 writes. Another one makes a killed run of an older version start over.
WORK_VERSION = 4

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

# 16 bytes of blake2b: two different things have the same one less often than a disk returns a wrong byte unnoticed.
DIGEST_BYTES = 16
_DIGEST = pa.binary(DIGEST_BYTES)

# What became of each record of a partition, in order. `reason` is null for those that are in the token file; only they
# have digests: of source and id; of the tokens, the images and the `repeat` that a source's weight asks for; and of
# each image.
OUTCOMES = pa.schema(
    [
        ("record_id", pa.string()),
        ("source", pa.string()),
        ("length", pa.int32()),
        ("images", pa.int32()),
        ("cut_turns", pa.int32()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("id", _DIGEST),
        ("content", _DIGEST),
        ("digests", pa.list_(_DIGEST)),
    ]
)

# Where images are also compared by what they look like (looks.py): their keys, beside `digests`.
LOOKS = pa.field("looks", _BYTES)

# The digests of the images of an evaluation set; where they are compared by looks, also keys and names.
IMAGES = pa.schema([("image", _DIGEST)])
IMAGES_WITH_LOOKS = pa.schema([("image", _DIGEST), ("looks", pa.binary()), ("name", pa.string())])

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


def digest(*parts: bytes) -> bytes:
    """Digest of some byte strings, which tells ("ab", "c") from ("a", "bc")."""
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.digest()
