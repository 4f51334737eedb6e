"""WebDataset tar shards as a source.

Files whose names are the same up to the first dot of the last part, and that follow one another, are one sample.
Listing reads the tar headers and the text files; images are skipped, and read later by range from where they lie. An
image smaller than the read-ahead is read with its neighbours all the same, which from an object store is quicker than
a request for every header. Compressed tars cannot be read by range and are refused.
"""

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from pyarrow import fs

from pipelines.config import WebDatasetSource
from pipelines.sources.entries import EntryError, check_text, text_turns
from pipelines.sources.files import FileSet, RangeReader, location, parse_location
from pipelines.sources.source import Problem, Record
from pipelines.sources.unread import unread_file, unread_key

IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2"}  # validation says which may pass
_READ_AHEAD = 1 << 20
_LONGEST_TEXT = 16 << 20
_SHARDS_AT_ONCE = 8  # from a store; the records of as many shards are held
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class WebDataset:
    """Reader of a `WebDatasetSource`."""

    def __init__(self, config: WebDatasetSource):
        self.config = config
        self._files = FileSet(config.shards)
        self._ranges = RangeReader(self._files.filesystem, self._files.folder)

    def records(self) -> Iterator[Record]:
        """One record per sample, shard by shard. What cannot be read of a shard is one record with a problem.

        Raises:
            FileNotFoundError: a shard is not there.
            ValueError: a shard is compressed.
        """
        names = self._files.names()
        compressed = [name for name in names if name.endswith(_COMPRESSED)]
        if compressed:
            raise ValueError(
                f"source {self.config.label!r}: {compressed[0]} is compressed, and images cannot be read by range "
                "from it; unpack the shards to .tar (images are compressed already)"
            )
        if isinstance(self._files.filesystem, fs.LocalFileSystem):
            for name in names:
                yield from self._shard(name)
            return
        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            waiting = iter(names)
            running = [pool.submit(self._whole_shard, name) for name in islice(waiting, _SHARDS_AT_ONCE)]
            try:
                while running:
                    yield from running.pop(0).result()
                    running += [pool.submit(self._whole_shard, name) for name in islice(waiting, 1)]
            finally:
                for future in running:
                    future.cancel()

    def read_image(self, location: str) -> bytes:
        """The file, untouched."""
        shard, offset, length, _ = parse_location(location)
        return self._ranges.read(shard, offset, length)

    def fingerprint(self) -> str:
        """Digest of the shards' names, sizes and times of change."""
        return self._files.fingerprint()

    def _whole_shard(self, name: str) -> list[Record]:
        return list(self._shard(name))

    def _shard(self, name: str) -> Iterator[Record]:
        key, members = None, {}
        with self._files.filesystem.open_input_file(self._files.path(name)) as raw:
            stream = io.BufferedReader(raw, _READ_AHEAD)
            try:
                for member in _members(stream):
                    folder, file = posixpath.split(posixpath.normpath(member.name))
                    stem, dot, ending = file.partition(".")
                    if not (stem and dot):  # without a name or an ending it belongs to no sample
                        continue
                    if posixpath.join(folder, stem) != key:
                        if members:
                            yield self._record(name, key, members)
                        key, members = posixpath.join(folder, stem), {}
                    content = self._content(name, member, ending.lower(), stream)
                    if ending.lower() in members:
                        content = EntryError(f"the sample has two files .{ending.lower()}")
                    members[ending.lower()] = content
            except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:  # the latter of absurd numbers
                damage = Problem("shard_damaged", f"{name}: {error}; what follows there is lost, write the shard again")
            else:
                damage = None
        if members:
            yield self._record(name, key, members)
        if damage:
            yield Record(f"{name}[damaged]", self.config.label, problem=damage)

    def _content(self, shard: str, member: tarfile.TarInfo, ending: str, stream) -> object:
        """The location of an image, the text or JSON of a file, or the EntryError that it is."""
        if ending.rpartition(".")[2] in IMAGES:
            return _Image(location(shard, member.offset_data, member.size, posixpath.basename(member.name)))
        if ending.partition(".")[0] not in self._texts:
            return None
        if member.size > _LONGEST_TEXT:
            return EntryError(f"the file .{ending} has {member.size} bytes, over the limit of {_LONGEST_TEXT}")
        stream.seek(member.offset_data)
        data = stream.read(member.size)
        try:
            text = data.decode("utf-8-sig")
            return json.loads(text) if ending.endswith("json") else text
        except ValueError as error:
            return EntryError(f"the file .{ending} cannot be read: {error}")

    @property
    def _texts(self) -> set[str]:
        """First parts of the endings of the files that are read when listing."""
        fields = (self.config.conversation, self.config.question, self.config.answer, self.config.caption)
        return {field.partition(".")[0] for field in fields if field is not None}

    def _record(self, shard: str, key: str, members: dict[str, object]) -> Record:
        record_id = f"{shard.removesuffix('.tar')}/{key}"
        try:
            check_text("the sample's name", record_id)
            for content in members.values():
                if isinstance(content, EntryError):
                    raise content
            endings = sorted((e for e, content in members.items() if isinstance(content, _Image)), key=_number)
            images = [str(members[ending]) for ending in endings]
            if not self.config.text_only:
                self._check_images(members, len(images))
            turns = text_turns(self.config, lambda field: _field(members, field), record_id, len(images))
            return Record(record_id, self.config.label, images, turns)
        except EntryError as error:
            record_id = record_id.encode("utf-8", "replace").decode()
            return Record(record_id, self.config.label, problem=error.problem)

    def _check_images(self, members: dict[str, object], images: int) -> None:
        """Raise EntryError for a sample that lacks its image, or has video."""
        unread = next(filter(None, map(unread_file, () if images else members)), None)
        for content in members.values():
            if unread is None and isinstance(content, dict):
                unread = unread_key(content, (), images)
        if unread:
            raise EntryError(unread, "image_missing")
        if not images:
            has = ", ".join(f".{ending}" for ending in [*members][:10])
            raise EntryError(
                f"the sample has no image (its files: {has}); text_only: true takes such samples", "image_missing"
            )


class _Image(str):
    """An image's location, among the texts of a sample."""


def _members(stream) -> Iterator[tarfile.TarInfo]:
    """The files of a tar.

    Raises:
        tarfile.TarError: it is no tar, is cut off, or has a damaged header. (tarfile by itself takes a damaged header
            for the end.)
    """
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while member := tar.next():
            tar.members.clear()  # else it keeps every header
            if member.isfile():
                yield member
        stream.seek(tar.offset)
        end = stream.read(tarfile.BLOCKSIZE)
        if end != bytes(tarfile.BLOCKSIZE):
            what = "a damaged header" if len(end) == tarfile.BLOCKSIZE else "no end mark, it is cut off"
            raise tarfile.ReadError(f"{what} at byte {tar.offset}")


def _number(ending: str) -> int:
    """Place of an image within its sample: 1 for k.1.jpg. Those without a number come first, as they stand."""
    first = ending.partition(".")[0]
    return int(first) if first.isdecimal() else -1


def _field(members: dict[str, object], field: str) -> object:
    """A member by its ending, or a key of a JSON member."""
    ending, keys = field, []
    while ending not in members:
        ending, dot, key = ending.rpartition(".")
        if not dot:
            raise EntryError(f"the sample has no file .{field.partition('.')[0]}")
        keys.insert(0, key)
    value = members[ending]
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise EntryError(f"the file .{ending} has no {key!r}")
        value = value[key]
    return value
