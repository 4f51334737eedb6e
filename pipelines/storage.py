"""Files at a path or URI, on a local disk or in an object store, written so that no reader ever sees half of one.

On a local disk a file is written beside its place, flushed, and renamed over it. In an object store it is first
written to a local temporary file and then uploaded by one stream: the store shows an object only when it is complete.
"""

import errno
import hashlib
import os
import posixpath
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

_CHUNK = 1 << 22  # bytes per copy step
_HASH_CHUNK = 1 << 18  # bytes per hashing step: small enough to stay in the cache
WRITE_BUFFER = 1 << 20  # bytes: a row of an Arrow file is two dozen small writes


def open_fs(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI (s3://, gs://, file://, ...) or local path, and the path within it.

    Raises:
        ValueError: pyarrow knows no file system for the scheme.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    scheme, rest = uri.split("://", 1)
    base, mark, query = rest.partition("?")
    bucket, _, path = base.partition("/")
    try:
        if scheme != "s3":
            return fs.FileSystem.from_uri(uri)
        filesystem, root = _bucket(f"s3://{bucket}{mark}{query}")
    except pa.ArrowInvalid:  # not passed on: its text repeats the URI, which may hold a password
        raise ValueError(
            f"cannot open {shown(uri)}; use a local path, s3:// or gs://, after the ? only options that pyarrow knows "
            "(region, scheme, endpoint_override, ...)"
        ) from None
    return filesystem, posixpath.join(root, unquote(path)).rstrip("/")


@lru_cache(maxsize=64)
def _bucket(uri: str) -> tuple[fs.FileSystem, str]:
    """A bucket's file system: making the client costs more than reading a small file."""
    return fs.FileSystem.from_uri(uri)


_SECRET_OPTION = re.compile(r"(?i)([?&;][^=&;]*(?:key|secret|token|password|signature|credential)[^=&;]*=)[^&;#]*")


def shown(uri: str) -> str:
    """The URI for messages and logs: without the user:password@ that may stand before the host, and without the values
    of options that hold a secret (secret_key, session_token, ...)."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    authority, slash, path = rest.partition("/")
    return _SECRET_OPTION.sub(r"\1...", scheme + mark + authority.rpartition("@")[2] + slash + path)


def join(uri: str, *names: str) -> str:
    """`uri` with names appended to its path. A query (s3://bucket/folder?region=...) stays at the end."""
    if "://" not in uri:
        return os.path.join(uri, *names)
    base, mark, query = uri.partition("?")
    return posixpath.join(base, *names) + mark + query


def is_local(uri: str) -> bool:
    """Whether a path or URI is of a local disk."""
    return isinstance(open_fs(uri)[0], fs.LocalFileSystem)


def exists(uri: str) -> bool:
    """Whether there is a file or folder."""
    return _info(uri).type != fs.FileType.NotFound


def size(uri: str) -> int | None:
    """Bytes of a file, or None when there is none."""
    info = _info(uri)
    return info.size if info.type == fs.FileType.File else None


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError when it is not there."""
    with open_input(*open_fs(uri)) as file:
        return file.read()


class TooLarge(ValueError):
    """A file or member that is larger than its reader allows."""


class NotReadable(ValueError):
    """What stands where a file is expected is none that may be read: a pipe, a device, a link to somewhere else."""


def open_input(filesystem: fs.FileSystem, path: str, stream: bool = False) -> pa.NativeFile:
    """Open a file to be read by ranges, or as a stream from its start, which unpacks .gz by itself.

    Raises:
        NotReadable: it is a pipe, a socket or a device, where opening or reading could wait for ever, or a folder.
        OSError: there is no such file.
    """
    if isinstance(filesystem, fs.LocalFileSystem):
        check_readable(path)
    return filesystem.open_input_stream(path) if stream else filesystem.open_input_file(path)


def check_readable(path: str) -> None:
    """Raise NotReadable with its path for what is on a local disk and is no file. What is not there passes."""
    with suppress(FileNotFoundError, NotADirectoryError):
        try:
            _check_file(os.stat(path))
        except IsADirectoryError:
            raise NotReadable(f"{path} is a folder and no file") from None
        except NotReadable as error:
            kind = str(error).removeprefix("it is ")
            raise NotReadable(f"{path} is {kind}: write what comes out of it into a file, and name that") from None


def read_path(filesystem: fs.FileSystem, path: str, limit: int | None = None, inside: str | None = None) -> bytes:
    """The whole file, for callers that read many files of one file system.

    Args:
        filesystem: of the file.
        path: within it.
        limit: bytes at most.
        inside: folder on a local disk that symbolic links must not lead out of.

    Raises:
        TooLarge: over `limit` bytes.
        NotReadable: it is a pipe, a socket or a device, which could wait for ever, or a link out of `inside`.
        OSError: there is no such file, it cannot be read, or its size changed meanwhile.
    """
    if isinstance(filesystem, fs.LocalFileSystem):
        return _read_local(path, limit, inside)
    with filesystem.open_input_file(path) as file:
        if limit is not None and file.size() > limit:
            raise TooLarge(f"the file has {file.size()} bytes, over the limit of {limit}")
        return file.read()


def _read_local(path: str, limit: int | None, inside: str | None) -> bytes:
    if inside is not None:
        real, root = os.path.realpath(path), _real(inside)
        if os.path.commonpath([real, root]) != root:
            raise NotReadable(f"it is a symbolic link that leads out of its folder, to {real}")
    _check_file(os.stat(path))  # before it is opened: opening a device can do things
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        _check_file(status)
        if limit is not None and status.st_size > limit:
            raise TooLarge(f"the file has {status.st_size} bytes, over the limit of {limit}")
        data = file.read(status.st_size + 1)
    if len(data) != status.st_size:
        raise OSError(f"the file had {status.st_size} bytes and then others: something writes to it")
    return data


@lru_cache(maxsize=64)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _check_file(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise NotReadable(f"it is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')} and no file")


def checksum(uri: str) -> tuple[int, str]:
    """Size in bytes and sha256 of a file, reading it in pieces."""
    filesystem, path = open_fs(uri)
    digest, length = hashlib.sha256(), 0
    step = _HASH_CHUNK if isinstance(filesystem, fs.LocalFileSystem) else _CHUNK  # elsewhere every step is a request
    with open_input(filesystem, path) as file:
        while chunk := file.read(step):
            digest.update(chunk)
            length += len(chunk)
    return length, digest.hexdigest()


def write_atomic(uri: str | os.PathLike, data: bytes | str) -> None:
    """Write a whole file or nothing, making its folder on a local disk. Text is written as UTF-8."""
    with atomic_file(os.fspath(uri)) as path, open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(uri: str) -> Iterator[str]:
    """Give a local path to write to; when the block ends without an error, what was written there becomes `uri`."""
    filesystem, path = open_fs(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        beside = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            yield beside
            _flush(beside)
            os.replace(beside, path)
        finally:
            if os.path.exists(beside):
                os.remove(beside)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "file")
        yield local
        try:
            with open(local, "rb") as source, filesystem.open_output_stream(path) as sink:
                shutil.copyfileobj(source, sink, _CHUNK)
        except BaseException:
            # Leaving the block closed the stream, which may have made an object of what was sent.
            with suppress(OSError):
                filesystem.delete_file(path)
            raise


def open_arrow(uri: str, columns: list[str] | None = None, mapped: bool = True) -> pa.ipc.RecordBatchFileReader:
    """An Arrow IPC file for random access: memory-mapped on a local disk, by byte ranges elsewhere.

    Args:
        uri: the file.
        columns: give only these. Nothing is fetched of the others, which matters where images are among them.
        mapped: False reads byte ranges also on a local disk, which is faster for rows that are read only once.
    """
    filesystem, path = open_fs(uri)
    local = isinstance(filesystem, fs.LocalFileSystem)
    if local:
        check_readable(path)
    file = pa.memory_map(path) if local and mapped else filesystem.open_input_file(path)
    reader = pa.ipc.open_file(file)
    if columns is None:
        return reader
    chosen = [reader.schema.get_field_index(column) for column in columns]
    return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=chosen))


def write_table(uri: str, table: pa.Table) -> None:
    """Write an Arrow IPC file, whole or not at all."""
    with atomic_file(uri) as path, pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def list_names(uri: str) -> list[str]:
    """Names of the files directly in a folder, sorted. A folder that is not there has none."""
    filesystem, path = open_fs(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == fs.FileType.File)


def sizes(uri: str) -> dict[str, int]:
    """Bytes of each file directly in a folder, by name: one listing. A folder that is not there has none."""
    filesystem, path = open_fs(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return {info.base_name: info.size for info in infos if info.type == fs.FileType.File}


def delete(uri: str) -> None:
    """Delete a file if it is there."""
    filesystem, path = open_fs(uri)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        filesystem.delete_file(path)


def delete_folder(uri: str) -> None:
    """Delete a folder and all in it, if it is there."""
    filesystem, path = open_fs(uri)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        filesystem.delete_dir(path)


def _info(uri: str) -> fs.FileInfo:
    filesystem, path = open_fs(uri)
    return filesystem.get_file_info(path)


def _flush(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
