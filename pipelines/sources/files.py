"""Many files of one source, named by patterns, and reads of byte ranges from them.

An image that is stored within a larger file has the location `FILE!OFFSET+LENGTH!NAME`: the file (relative to the
folder that the patterns have in common), where in it, and the name that people know the image by. So a worker reads
it without knowing the rest of the file, and messages say where it is.
"""

import fnmatch
import hashlib
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain

from pyarrow import fs

from pipelines import storage

MAX_FILE_BYTES = 256 << 20  # an encoded image larger than this would take a worker's memory
_LOCATION = re.compile(r"(.*?)!(\d+)\+(\d+)!(.*)", re.DOTALL)
_OPEN_FILES = 8
_BLOCK, _BLOCKS = 4 << 20, 8  # bytes fetched at a time, and how many such pieces are kept
_MARKS = "*?[{"


def location(file: str, offset: int, length: int, name: str) -> str:
    """The location of a range of a file."""
    return f"{file}!{offset}+{length}!{name}"


def parse_location(text: str) -> tuple[str, int, int, str]:
    """File, offset, length and name of a location. Raises ValueError when it is none."""
    match = _LOCATION.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a location within a file")
    return match[1], int(match[2]), int(match[3]), match[4]


class RangeReader:
    """Reads of byte ranges from the files of one folder; the files read last stay open.

    Args:
        filesystem: of the files.
        folder: that their names are relative to.
        in_order: the files are read from their start to their end, more or less. From a store they are then fetched in
            blocks, of which the last ones are kept: what is looked at twice is fetched once.
    """

    def __init__(self, filesystem: fs.FileSystem, folder: str, in_order: bool = False):
        @lru_cache(maxsize=_OPEN_FILES)
        def open_file(name: str):
            return storage.open_input(filesystem, posixpath.join(folder, name))

        @lru_cache(maxsize=_BLOCKS)
        def block(name: str, number: int) -> bytes:
            return open_file(name).read_at(_BLOCK, number * _BLOCK)

        self._open_file, self._block = open_file, block
        self._blocks = in_order and not isinstance(filesystem, fs.LocalFileSystem)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """The range, or what there is of it before the file ends. Raises TooLarge, FileNotFoundError."""
        if length > MAX_FILE_BYTES:
            raise storage.TooLarge(f"{length} bytes, over the limit of {MAX_FILE_BYTES}")
        if not self._blocks or length > _BLOCK * (_BLOCKS - 1):
            return self._open_file(name).read_at(length, offset)
        length = min(length, self.size(name) - offset)  # a store refuses to read behind the end
        if length <= 0:
            return b""
        first, last = offset // _BLOCK, (offset + length - 1) // _BLOCK
        data = b"".join(self._block(name, number) for number in range(first, last + 1))
        return data[offset - first * _BLOCK :][:length]

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._open_file(name).size()

    def forget(self) -> None:
        """Give back the memory of the blocks that are kept."""
        self._block.cache_clear()


class RangeStream:
    """A file of a `RangeReader` as a stream."""

    def __init__(self, ranges: RangeReader, name: str):
        self._ranges, self._name, self._at = ranges, name, 0

    def seek(self, at: int) -> None:
        """Go to a place."""
        self._at = at

    def read(self, length: int) -> bytes:
        """The next bytes."""
        data = self._ranges.read(self._name, self._at, length)
        self._at += len(data)
        return data


class FileSet:
    """The files that some patterns name: {000..123} and {a,b} in their order, * and ? sorted.

    Raises:
        ValueError: the patterns are in different stores.
    """

    def __init__(self, patterns: str | list[str]):
        every = [patterns] if isinstance(patterns, str) else patterns
        self._shown = storage.shown(every[0])
        with _answering(self._shown):
            opened = [_open(pattern) for pattern in every]
        self.filesystem = opened[0][0]
        if any(filesystem != self.filesystem for filesystem, *_ in opened):
            raise ValueError("the files of one source must lie in one store: make a source of each store's files")
        self._patterns = [(folder, rest) for _, folder, rest in opened]
        self.folder = posixpath.commonpath([folder for folder, _ in self._patterns])

    def names(self) -> list[str]:
        """The files, relative to `folder`.

        Raises:
            FileNotFoundError: a file is not there, or nothing fits a pattern.
            NotReadable: what a name or pattern fits is no file but a pipe, a device or a folder. Folders are left out
                only where the pattern does not say how a file's name ends ("*").
        """
        return [info.path[len(self.folder) :].lstrip("/") for info in self._infos()]

    def path(self, name: str) -> str:
        """Path of a file within the file system."""
        return posixpath.join(self.folder, name)

    def fingerprint(self) -> str:
        """Digest of the files' names, sizes and times of change. The files are not read."""
        facts = [[name, info.size, info.mtime_ns] for name, info in zip(self.names(), self._infos(), strict=True)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def facts(self, name: str) -> str:
        """A digest of a file's name, size and time of change."""
        info = self.filesystem.get_file_info(self.path(name))
        return hashlib.sha256(repr([name, info.size, info.mtime_ns]).encode()).hexdigest()

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self.filesystem.get_file_info(self.path(name)).size

    def lost(self, name: str, at: int, cut: bool) -> tuple[int, int]:
        """Bytes that are lost when a file can be read up to `at`, and bytes that all files should have.

        A file that is `cut` off is taken to have been as large as the others are on average. Of one alone nobody knows:
        then all counts as lost.
        """
        sizes = dict(zip(self.names(), (info.size for info in self._infos()), strict=True))
        own, others = sizes.pop(name), sum(sizes.values())
        if cut and not sizes:
            return max(own, 1), max(own, 1)
        whole = max(own, others // len(sizes)) if cut else own
        return max(whole - at, 1), max(whole + others, 1)

    def _infos(self) -> list[fs.FileInfo]:
        with _answering(self._shown):
            return list(chain.from_iterable(self._find(folder, rest) for folder, rest in self._patterns))

    def _find(self, folder: str, rest: str) -> list[fs.FileInfo]:
        found = []
        names = _braces(rest)
        plain = iter(self.filesystem.get_file_info([posixpath.join(folder, n) for n in names if not _is_glob(n)]))
        for name in names:
            matches = self._glob(folder, name) if _is_glob(name) else [next(plain)]
            for match in matches:
                self._check(match)
            if not matches:
                raise FileNotFoundError(f"there is no file {posixpath.join(folder, name)}")
            found += matches
        return found

    def _check(self, info: fs.FileInfo) -> None:
        """Raise NotReadable or FileNotFoundError for what is no file."""
        if info.type == fs.FileType.File:
            return
        if isinstance(self.filesystem, fs.LocalFileSystem):
            storage.check_readable(info.path)
        elif info.type == fs.FileType.Directory:
            raise storage.NotReadable(f"{info.path} is a folder and no file")
        raise FileNotFoundError(f"there is no file {info.path}")

    def _glob(self, folder: str, pattern: str) -> list[fs.FileInfo]:
        parts = pattern.split("/")
        selector = fs.FileSelector(folder, allow_not_found=True, recursive=len(parts) > 1)
        found = []
        for info in self.filesystem.get_file_info(selector):
            names = info.path[len(folder) :].strip("/").split("/")
            fits = len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names, parts))
            if fits and (info.type != fs.FileType.Directory or "." in parts[-1]):
                found.append(info)
        return sorted(found, key=lambda info: info.path)


@contextmanager
def _answering(shown: str) -> Iterator[None]:
    """An error of a store's own client (that of hf:// has classes of its own) as an OSError that names the files."""
    try:
        yield
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(f"{shown} cannot be listed ({what}): is its store reachable from here?") from error


def _open(pattern: str) -> tuple[fs.FileSystem, str, str]:
    """File system, the folder before the first mark, and the rest of the pattern."""
    base, query = pattern, ""
    if "://" in pattern and re.search(r"\?\w+=", pattern):  # else the question mark is the pattern's
        base, mark, options = pattern.rpartition("?")
        query = mark + options
    parts = base.split("/")
    fixed = next((i for i, part in enumerate(parts[:-1]) if any(mark in part for mark in _MARKS)), len(parts) - 1)
    folder = "/".join(parts[:fixed]) or ("/" if base.startswith("/") else ".")
    filesystem, path = storage.open_fs(folder + query)
    return filesystem, path, "/".join(parts[fixed:])


def _is_glob(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def _braces(pattern: str) -> list[str]:
    """The names that {000..123} and {a,b} stand for. Other braces stay as they are."""
    start = pattern.find("{")
    end = pattern.find("}", start)
    if start < 0 or end < 0:
        return [pattern]
    inside, rests = pattern[start + 1 : end], _braces(pattern[end + 1 :])
    first, dots, last = inside.partition("..")
    if dots and first.isdecimal() and last.isdecimal():
        width = len(first) if first.startswith("0") else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",") if "," in inside else [f"{{{inside}}}"]
    return [pattern[:start] + choice + rest for choice in choices for rest in rests]
