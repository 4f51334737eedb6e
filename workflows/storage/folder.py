"""A folder of a workflow as a value: where it is, this machine's copy of it, and how it becomes whole.

The same code works on a disk and in an object store (s3://, gs://). On a disk a folder is whole when it has its name:
it is written beside and renamed. A store has no rename, so there a folder is whole when its complete.json is there: it
names the files with their sizes, is written last and deleted first. Folders without it are ignored. This relies on S3
and GCS showing every write at once to everyone.
"""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines import storage
from workflows.storage.remote import cached, download, in_threads, is_remote, machine_lock, upload

WHOLE = "complete.json"


@dataclass(frozen=True)
class Folder:
    """A folder, or a file in one, on a disk that all nodes see or in an object store.

    Attributes:
        uri: the absolute path, or the store's URI. A path, a relative one and file:// become an absolute path.
    """

    uri: str

    def __post_init__(self):
        where = str(self.uri)
        if is_remote(where):
            base, mark, query = where.partition("?")
            where = base.rstrip("/") + mark + query
        else:
            where = str(Path(where.removeprefix("file://")).expanduser().absolute())
        object.__setattr__(self, "uri", where)

    def __truediv__(self, name: str) -> "Folder":
        """The folder or file of this name inside."""
        return Folder(storage.join(self.uri, *name.split("/")))

    def __str__(self) -> str:
        return self.shown

    @property
    def shown(self) -> str:
        """Its path or URI for people and records: without a password."""
        return storage.shown(self.uri)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.uri.partition("?")[0].rpartition("/")[2] if self.remote else Path(self.uri).name

    @property
    def remote(self) -> bool:
        """Whether it is in an object store."""
        return is_remote(self.uri)

    @property
    def local(self) -> Path:
        """Itself, or where this machine's copy lies, which may be old or not there: see `fetch`."""
        return cached(self.uri) if self.remote else Path(self.uri)

    def beside(self, name: str) -> "Folder":
        """The folder or file of this name in the same folder."""
        if not self.remote:
            return Folder(str(Path(self.uri).with_name(name)))
        base, mark, query = self.uri.partition("?")
        return Folder(f"{base.rpartition('/')[0]}/{name}{mark}{query}")

    def exists(self) -> bool:
        """Whether a file or folder is there, whole or not."""
        return storage.exists(self.uri)

    def whole(self) -> bool:
        """Whether it can be read: in a store its complete.json is there, on a disk it has its name."""
        return storage.size(storage.join(self.uri, WHOLE)) is not None if self.remote else self.local.is_dir()

    def read(self, name: str) -> bytes:
        """A small file in it. Raises FileNotFoundError when it is not there."""
        return storage.read_bytes((self / name).uri)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a small file into it, whole or not at all."""
        storage.write_atomic((self / name).uri, content)

    def delete(self) -> None:
        """Delete it with all that is in it, if it is there. complete.json goes first: no half of it looks whole."""
        storage.delete(storage.join(self.uri, WHOLE))
        storage.delete_folder(self.uri)

    def fetch(self) -> Path:
        """It as files of this machine: itself, or the copy, downloaded unless that is of the last transfer.

        Raises:
            FileNotFoundError: the store has no whole folder of this name.
            OSError: it cannot be downloaded.
        """
        local = self.local
        if not self.remote:
            return local
        with machine_lock(local):  # of several processes on this machine, one downloads
            try:
                text = self.read(WHOLE)
            except FileNotFoundError:
                raise FileNotFoundError(f"{self} is not there, or not whole: it has no {WHOLE}") from None
            mark = self._mark
            if local.is_dir() and mark.exists() and mark.read_bytes() == text:
                return local
            partial = local.with_name(f".{local.name}.fetched")
            shutil.rmtree(partial, ignore_errors=True)
            files: dict[str, int] = json.loads(text)["files"]
            for name in files:
                if not (partial / name).resolve().is_relative_to(partial.resolve()):
                    raise OSError(f"{self}: {WHOLE} names a file outside of it ({name})")
            in_threads(lambda name: download((self / name).uri, partial / name, files[name]), list(files))
            mark.unlink(missing_ok=True)
            shutil.rmtree(local, ignore_errors=True)
            partial.rename(local)
            storage.write_atomic(mark, text)
        return local

    def fetch_file(self, name: str) -> None:
        """Copy one small file to this machine's copy, of a folder that is not fetched whole. On a disk nothing."""
        if self.remote:
            storage.write_atomic(self.local / name, self.read(name))

    def publish(self, made: Path | None = None) -> None:
        """Make what is in the store the same as this machine's copy, complete.json last. On a disk nothing is to do.

        Args:
            made: a finished folder on the same disk that is moved to this one's place first, over what is there.

        Raises:
            OSError: it cannot be written. In a store it is then not whole.
        """
        local = self.local
        if made is not None:
            self._mark.unlink(missing_ok=True)
            local.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(local, ignore_errors=True)
            made.rename(local)
        if not self.remote:
            return
        files = sorted(file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file())
        with machine_lock(local):
            self._mark.unlink(missing_ok=True)
            self.delete()
            in_threads(lambda name: upload(local / name, (self / name).uri), files)
            sizes = {name: (local / name).stat().st_size for name in files}
            text = json.dumps({"upload": uuid.uuid4().hex, "files": sizes}, indent=1)
            self.write(WHOLE, text)
            storage.write_atomic(self._mark, text)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Write it anew: gives the path to write to, and publishes what is there after the block."""
        if self.remote:
            self._mark.unlink(missing_ok=True)  # from here on the copy is not the store's
        self.local.parent.mkdir(parents=True, exist_ok=True)
        yield self.local
        self.publish()

    @contextmanager
    def editing(self) -> Iterator[Path]:
        """Work on it: gives it as files of this machine, fetched if it is whole, and publishes them if they changed."""
        yield self.fetch() if self.remote and self.whole() else self.local
        if self.changed():
            self.publish()

    def changed(self) -> bool:
        """Whether this machine's copy has files that are newer than its last transfer; never so on a disk."""
        if not self.remote:
            return False
        if not self._mark.exists():
            return True
        then = self._mark.stat().st_mtime_ns
        return any(file.stat().st_mtime_ns > then for file in self.local.rglob("*") if file.is_file())

    @property
    def _mark(self) -> Path:
        """complete.json of the last transfer, beside the copy, so that the copy has the folder's own files only."""
        return self.local.with_name(f".{self.local.name}.{WHOLE}")
