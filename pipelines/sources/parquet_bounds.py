"""What a Parquet file may unfold to: a value that is stored once may be that of a million rows.

A few hundred bytes can stand for gigabytes. What follows keeps the memory of a batch, and all text of a row group,
within bounds that files of records stay far below.
"""

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.sources.parquet_pages import pages

UNFOLDS = 1000  # text is at most this many times its file, beyond a size that does no harm
_SMALL = 64 << 20
_FEW_ROWS, _ROWS_A_BYTE = 1024, 8  # of a file: a row of records takes bytes, not fractions of a bit


class Unfolds(ValueError):
    """A file claims more than its bytes can hold."""


def most_text(size: int) -> int:
    """Characters of text that are read from a row group of a file of `size` bytes."""
    return _SMALL + UNFOLDS * size


def texts(file: pq.ParquetFile, columns: list[str]) -> list[str]:
    """Those among columns that are plain strings."""
    kinds = {field.name: field.type for field in file.schema_arrow}
    return [name for name in columns if name in kinds and _is_text(kinds[name])]


def no_images(kind: pa.DataType) -> str | None:
    """What a column of this type holds instead of images."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind):
        return None
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        return None if "bytes" in names else f"objects of {', '.join(names)}"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else f"values of type {kind}"


def check_claims(group: pq.RowGroupMetaData, columns: list[str], size: int) -> None:
    """Raise ValueError for a row group that would unfold beyond what a file of records does."""
    if group.num_rows > _FEW_ROWS + _ROWS_A_BYTE * size:
        raise Unfolds(f"it claims {group.num_rows:,} rows in a file of {size:,} bytes")
    for facts in map(group.column, range(group.num_columns)):
        if facts.path_in_schema.partition(".")[0] in {name.partition(".")[0] for name in columns}:
            _check_values(facts, facts.num_values, size)
            large = facts.total_uncompressed_size > _SMALL
            if large and facts.total_uncompressed_size > UNFOLDS * facts.total_compressed_size:
                raise Unfolds(f"column {facts.path_in_schema} unfolds to {facts.total_uncompressed_size:,} bytes")


def check_pages(file: pa.NativeFile, group: pq.RowGroupMetaData, columns: list[str], size: int) -> None:
    """Raise ValueError where the pages of columns claim more than `check_claims` lets the footer claim.

    A reader goes by the pages' headers. They are read one by one, some bytes a page.

    Args:
        file: the Parquet file.
        columns: their names, or those of leaves ("image.path").
        size: of the file in bytes.
    """
    for facts in map(group.column, range(group.num_columns)):
        if not any(f"{facts.path_in_schema}.".startswith(f"{name}.") for name in columns):
            continue
        unfolded, values = 0, 0
        for page in pages(file, facts):
            unfolded, values = unfolded + page.size, values + page.values
            _check_values(facts, values, size)
            if unfolded > _SMALL and unfolded > UNFOLDS * facts.total_compressed_size:
                raise Unfolds(f"pages of column {facts.path_in_schema} unfold to {unfolded:,} bytes")


def _check_values(facts: pq.ColumnChunkMetaData, values: int, size: int) -> None:
    if values > _FEW_ROWS + _ROWS_A_BYTE * size:
        raise Unfolds(f"column {facts.path_in_schema} claims {values:,} values in a file of {size:,} bytes")


def batch_rows(file: pq.ParquetFile, group: int, columns: list[str], most: int, limit: int) -> int:
    """Rows of a batch that stays within a limit even if each had the longest value that its column can hold."""
    plain = {*texts(file, columns)}
    facts = file.metadata.row_group(group)
    names = {name.partition(".")[0] for name in columns if name not in plain}
    sizes = [
        column.total_uncompressed_size
        for column in map(facts.column, range(facts.num_columns))
        if column.path_in_schema.partition(".")[0] in names and column.physical_type == "BYTE_ARRAY"
    ]
    return max(1, min(most, limit // max([*sizes, 1])))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind.value_type if pa.types.is_dictionary(kind) else kind)


def characters(values: object) -> int:
    """Characters of all texts in a row."""
    if isinstance(values, str):
        return len(values)
    if isinstance(values, dict):
        return sum(map(characters, values.values()))
    return sum(map(characters, values)) if isinstance(values, list) else 0


def repeats_long_text(column: pa.Array) -> bool:
    """Whether the values of a column would take much more memory one by one than they do in the batch."""
    if not pa.types.is_dictionary(column.type):
        return False
    longest = pc.max(pc.binary_length(column.dictionary)).as_py() or 0
    return len(column) * longest > _SMALL
