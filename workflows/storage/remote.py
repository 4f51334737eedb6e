"""An object store as storage: what a workflow keeps there, and each machine's copies.

A workflow works with folders. With `--storage s3://bucket/lab` every folder has its place in the store, and a copy
below the cache folder (MLMAMBA_CACHE, or ~/.cache/mlmamba) of the machines that need it:

    s3://bucket/lab/runs/tiny-1/initial    <cache>/s3/bucket-3f2a90c1/lab/runs/tiny-1/initial

What is in the store counts; copies can be deleted whenever nothing runs. A store has no rename, so a folder there is
whole when its complete.json is there: it names the files with their sizes, is written last and taken away first.
Folders without it are ignored. S3 and GCS show every write at once to everyone, which this relies on.
"""

import fcntl
import hashlib
import json
import os
import posixpath
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from pyarrow import fs

from pipelines import storage
from pipelines.storage import join, shown

CACHE = "MLMAMBA_CACHE"
WHOLE = "complete.json"
_PIECE = 16 << 20  # bytes
_AT_ONCE = 4  # files in transfer

_mounted: dict[Path, str] = {}
"""URI of each store that this process uses as storage, by its copy's folder."""


def is_remote(place: str) -> bool:
    """Whether a path or URI is one of an object store."""
    return "://" in place and not place.startswith("file://")


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


def mount(uri: str) -> Path:
    """Use a store as this process's storage. Returns the folder of its copies; `place` leads back from there.

    Raises:
        ValueError: pyarrow knows no such store.
        OSError: it cannot be written to, or the copies cannot.
    """
    base, mark, query = uri.partition("?")
    uri = base.rstrip("/") + mark + query
    folder = cached(uri)
    probe = join(uri, f".writable-{uuid.uuid4().hex}")
    storage.write_atomic(probe, b"")
    storage.delete(probe)
    folder.mkdir(parents=True, exist_ok=True)
    _mounted[folder] = uri
    return folder


def place(path: Path | str) -> str:
    """Where a path below a mounted folder is in the store; any other path itself."""
    for folder, uri in _mounted.items():
        if Path(path).is_relative_to(folder):
            return join(uri, *Path(path).relative_to(folder).parts)
    return str(path)


def address(path: Path | str) -> str:
    """`place` for people and records: without a password."""
    return shown(place(path))


def at_hand(where: str) -> Path:
    """A folder as files of this machine: itself, or a copy of a store's.

    Raises:
        FileNotFoundError: the store has no whole folder of this name.
    """
    return bring(where) if is_remote(where) else Path(where)


def is_whole(uri: str) -> bool:
    """Whether a folder of a store is there, whole."""
    return storage.size(join(uri, WHOLE)) is not None


def upload_folder(local: Path, uri: str) -> None:
    """Make a folder of a store the same as a local one, complete.json last.

    Raises:
        OSError: it cannot be written. The folder is then not whole.
    """
    files = sorted(file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file())
    with _locked(local):
        _mark(local).unlink(missing_ok=True)
        storage.delete(join(uri, WHOLE))
        storage.delete_folder(uri)
        _in_threads(lambda name: send(local / name, join(uri, name)), files)
        sizes = {name: (local / name).stat().st_size for name in files}
        text = json.dumps({"upload": uuid.uuid4().hex, "files": sizes}, indent=1).encode()
        storage.write_atomic(join(uri, WHOLE), text)
        if local == cached(uri):
            storage.write_atomic(str(_mark(local)), text)


def bring(uri: str) -> Path:
    """This machine's copy of a whole folder of a store, fetched unless it is that of the last upload.

    Raises:
        FileNotFoundError: the store has no whole folder of this name.
        OSError: it cannot be fetched.
    """
    local = cached(uri)
    local.parent.mkdir(parents=True, exist_ok=True)
    with _locked(local):  # of several processes on this machine, one fetches
        try:
            text = storage.read_bytes(join(uri, WHOLE))
        except FileNotFoundError:
            raise FileNotFoundError(f"{shown(uri)} is not there, or not whole: it has no {WHOLE}") from None
        mark = _mark(local)
        if local.is_dir() and mark.exists() and mark.read_bytes() == text:
            return local
        partial = local.with_name(f".{local.name}.fetched")
        shutil.rmtree(partial, ignore_errors=True)
        files: dict[str, int] = json.loads(text)["files"]
        for name in files:
            if not (partial / name).resolve().is_relative_to(partial.resolve()):
                raise OSError(f"{shown(uri)}: {WHOLE} names a file outside of it ({name})")
        _in_threads(lambda name: fetch(join(uri, name), partial / name, files[name]), list(files))
        forget(local)
        shutil.rmtree(local, ignore_errors=True)
        partial.rename(local)
        storage.write_atomic(str(mark), text)
    return local


def forget(local: Path) -> None:
    """Say that a copy is not the store's any more; before it is changed here."""
    _mark(local).unlink(missing_ok=True)


def keep(folder: Path) -> None:
    """Upload a folder of a mounted store; nothing for other folders."""
    if is_remote(where := place(folder)):
        upload_folder(folder, where)


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Work on a folder of a mounted store: fetched before the block, uploaded after it. Others stay as they are."""
    where = place(folder)
    if is_remote(where) and is_whole(where):
        bring(where)
    yield
    if is_remote(where) and changed(folder):
        upload_folder(folder, where)


def changed(local: Path) -> bool:
    """Whether a copy has files that are newer than its last transfer."""
    mark = _mark(local)
    if not mark.exists():
        return True
    then = mark.stat().st_mtime_ns
    return any(file.stat().st_mtime_ns > then for file in local.rglob("*") if file.is_file())


def send(local: Path, uri: str) -> None:
    """Upload one file."""
    filesystem, path = storage.open_fs(uri)
    with open(local, "rb") as source, filesystem.open_output_stream(path) as sink:
        shutil.copyfileobj(source, sink, _PIECE)


def fetch(uri: str, local: Path, size: int) -> None:
    """Download one file, whole or not at all. Raises OSError, also when it has not this size in bytes."""
    local.parent.mkdir(parents=True, exist_ok=True)
    filesystem, path = storage.open_fs(uri)
    partial = local.with_name(f".{local.name}.partial")
    with filesystem.open_input_stream(path) as source, open(partial, "wb") as sink:
        shutil.copyfileobj(source, sink, _PIECE)
    if (found := partial.stat().st_size) != size:
        raise OSError(f"{shown(uri)} has {found} bytes, not the {size} that were written")
    os.replace(partial, local)


def fetch_once(uri: str, local: Path, size: int) -> None:
    """`fetch` for several processes of this machine that want the same file: one downloads."""
    with _locked(local):
        if not local.is_file():
            fetch(uri, local, size)


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly in a folder of a store, sorted; none when it is not there."""
    filesystem, path = storage.open_fs(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def _in_threads(function: Callable[[str], None], names: list[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE, "transfer") as pool:
        for _ in pool.map(function, names):
            pass


def _mark(local: Path) -> Path:
    """complete.json of the last transfer, beside the copy, so that the copy has the folder's own files only."""
    return local.with_name(f".{local.name}.{WHOLE}")


@contextmanager
def _locked(local: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    local.parent.mkdir(parents=True, exist_ok=True)
    with open(local.with_name(f".{local.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_SECONDS = 30.0


@contextmanager
def mirrored(folder: Path, names: tuple[str, ...], note: Callable[[str], None]) -> Iterator[None]:
    """Fetch files of a mounted folder before the block; send them while it runs, every half minute, and after it.

    Of a file that is here and in the store, the one here stays if it begins with the other. A machine that goes on
    after another was lost misses half a minute at most. For a folder that is no store's nothing is done.

    Args:
        note: told when the store does not take them.
    """
    places = {folder / name: place(folder / name) for name in names}
    if not all(is_remote(uri) for uri in places.values()):
        yield
        return
    mirror = _Mirror(places, note)
    mirror.start()
    try:
        yield
    finally:
        mirror.over.set()
        mirror.join()
        mirror.send()


class _Mirror(threading.Thread):
    def __init__(self, places: dict[Path, str], note: Callable[[str], None]):
        super().__init__(name="mirror", daemon=True)
        self.over = threading.Event()
        self._places, self._note, self._away = places, note, False
        self._sent = {file: _fetch_longer(file, uri) for file, uri in places.items()}

    def run(self) -> None:
        while not self.over.wait(_SECONDS):
            self.send()

    def send(self) -> None:
        """Send what has changed."""
        try:
            for file, uri in self._places.items():
                content = file.read_bytes() if file.exists() else b""
                if content != self._sent[file]:
                    storage.write_atomic(uri, content)
                    self._sent[file] = content
            self._away = False
        except OSError as error:  # training does not end for the sake of its log
            if not self._away:
                self._note(f"the store does not take the run's journal, which is sent later: {error}")
            self._away = True


def _fetch_longer(file: Path, uri: str) -> bytes:
    """What the store has; written to `file` unless that begins with it."""
    try:
        there = storage.read_bytes(uri)
    except FileNotFoundError:
        return b""
    here = file.read_bytes() if file.exists() else b""
    if not here.startswith(there):
        storage.write_atomic(str(file), there)
    return there
