"""Small images and files of the layouts that sources read, for tests."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def conversation(*texts: str) -> list[dict]:
    """Messages in LLaVA's form: human, gpt, human, ..."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write_files(folder: Path, files: dict[str, bytes | str | list | dict]) -> Path:
    """Files by path: bytes or text as they are, other values as JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(as_bytes(content))
    return folder


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive of files by path."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: list[tuple[str, bytes | str | list | dict]]) -> Path:
    """A tar of files in this order; a name may come twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(as_bytes(content))
            archive.addfile(info, io.BytesIO(as_bytes(content)))
    return path


def write_parquet(path: Path, columns: dict[str, list], schema: pa.Schema | None = None, rows: int = 4) -> Path:
    """A Parquet file with `rows` rows in a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=rows)
    return path


def as_bytes(content: bytes | str | list | dict) -> bytes:
    """Bytes as they are, text in UTF-8, other values as JSON."""
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()
