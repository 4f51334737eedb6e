"""Transfers between an object store and this machine's copies, and where a copy lies.

With `--storage s3://bucket/lab` every folder has a copy below the cache folder (MLMAMBA_CACHE, or ~/.cache/mlmamba) of
the machines that need it:

    s3://bucket/lab/runs/tiny-1/initial    <cache>/s3/bucket-3f2a90c1/lab/runs/tiny-1/initial

What is in the store counts; copies can be deleted whenever nothing runs.
"""

import hashlib
import os
import posixpath
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

from filelock import FileLock
from pyarrow import fs

from pipelines import storage
from pipelines.storage import shown

CACHE = "MLMAMBA_CACHE"
_PIECE = 16 << 20  # bytes
_AT_ONCE = 4  # files in transfer


def is_remote(uri: str) -> bool:
    """Whether a path or URI is one of an object store."""
    return "://" in uri and not uri.startswith("file://")


def cached(uri: str) -> Path:
    """Where this machine's copy of a folder or file of a store lies, or will. A user and password are no part of it."""
    base, _, query = uri.partition("?")
    scheme, _, rest = base.partition("://")
    authority, _, path = rest.partition("/")
    bucket = authority.rpartition("@")[2]
    key = hashlib.sha256(f"{scheme}://{bucket}?{query}".encode()).hexdigest()[:8]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get(CACHE) or Path(home, "mlmamba")).expanduser().absolute()
    inside = posixpath.normpath("/" + unquote(path)).lstrip("/")
    return root / scheme / f"{bucket}-{key}" / inside


def upload(local: Path, uri: str) -> None:
    """Upload one file."""
    filesystem, path = storage.open_fs(uri)
    with open(local, "rb") as source, filesystem.open_output_stream(path) as sink:
        shutil.copyfileobj(source, sink, _PIECE)


def download(uri: str, local: Path, size: int) -> None:
    """Download one file, whole or not at all. Raises OSError, also when it has not this size in bytes."""
    local.parent.mkdir(parents=True, exist_ok=True)
    filesystem, path = storage.open_fs(uri)
    partial = local.with_name(f".{local.name}.partial")
    with filesystem.open_input_stream(path) as source, open(partial, "wb") as sink:
        shutil.copyfileobj(source, sink, _PIECE)
    if (found := partial.stat().st_size) != size:
        raise OSError(f"{shown(uri)} has {found} bytes, not the {size} that were written")
    os.replace(partial, local)


def download_once(uri: str, local: Path, size: int) -> None:
    """`download` for several processes of this machine that want the same file: one downloads."""
    with machine_lock(local):
        if not local.is_file():
            download(uri, local, size)


def in_threads(transfer: Callable[[str], None], names: list[str]) -> None:
    """Transfer several files at once. Raises the first error."""
    with ThreadPoolExecutor(_AT_ONCE, "transfer") as pool:
        for _ in pool.map(transfer, names):
            pass


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; none when it is not there."""
    filesystem, path = storage.open_fs(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def machine_lock(local: Path) -> FileLock:
    """A lock beside a folder or file for the processes of this machine. That of a killed one is free at once."""
    local.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(local.with_name(f".{local.name}.lock"))
