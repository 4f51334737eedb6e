"""WebDataset tar shards as a source.

Files whose names are the same up to the first dot of the last part, and that follow one another, are one sample.
Listing reads the tar headers and the text files; images are skipped, and read by range from where they lie. A shard is
a fragment, because nobody knows what is in it before it is read; a large one on a local disk is cut behind its samples,
which the headers alone show. From an object store a shard is fetched in blocks, and a worker that lists it finds its
images in the blocks that it has: it is read once. Compressed tars cannot be read by range and are refused.
"""

import hashlib
import io
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice

from pyarrow import fs

from pipelines import storage
from pipelines.source_config import WebDatasetSource
from pipelines.sources.entries import EntryError, check_text, one_each, text_turns
from pipelines.sources.files import FileSet, RangeReader, RangeStream, location, parse_location
from pipelines.sources.json_stream import parse_json
from pipelines.sources.source import Fragment, Problem, Record
from pipelines.sources.tar_members import Member, TarDamage, members
from pipelines.sources.unread import unread_file, unread_key

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2")  # validation says which may pass
_NAMES_IMAGE = re.compile(rf"(?:\d+\.)?(?:{'|'.join(IMAGES)})")
_MOST_FILES = 10_000  # of a sample
_ENDINGS = 1000  # different ones that are remembered for an error
_READ_AHEAD = 1 << 20
_WHOLE = 256 << 20  # bytes of a shard that is not cut
_LONGEST_TEXT = 16 << 20
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class WebDataset:
    """Reader of a `WebDatasetSource`."""

    def __init__(self, config: WebDatasetSource):
        self.config = config
        self._files = FileSet(config.shards)
        self._ranges = RangeReader(self._files.filesystem, self._files.folder, in_order=True)
        self._seen: dict[str, None] = {}

    def records(self) -> Iterator[Record]:
        """One record per sample, shard by shard. What cannot be read of a shard is one record with a problem.

        Raises:
            FileNotFoundError: a shard is not there.
            ValueError: a shard is compressed, or no sample has a file that the config names.
        """
        self._seen = {}
        for count, record in enumerate((record for name in self.units() for record in self._shard(name)), 1):
            if count == self.config.limit:  # nobody asks for what comes after it
                self._check_files()
            yield record
        self._check_files()

    def _check_files(self) -> None:
        """Raise ValueError when no sample has a file that the config names."""
        for field in sorted(self._texts if self._seen else ()):
            if not any(ending.partition(".")[0] == field for ending in self._seen):
                has = ", ".join(f".{ending}" for ending in [*self._seen][:20])
                raise ValueError(
                    f"source {self.config.label!r}: no sample has a file .{field}; the samples have {has}. Check the "
                    "fields that the recipe names"
                )

    def units(self) -> list[str]:
        """The shards. Raises FileNotFoundError, ValueError."""
        names = self._files.names()
        compressed = [name for name in names if name.endswith(_COMPRESSED)]
        if compressed:
            raise ValueError(
                f"source {self.config.label!r}: {compressed[0]} is compressed, and images cannot be read by range "
                "from it; unpack the shards to .tar (images are compressed already)"
            )
        return names

    def cut(self, unit: str, size: int) -> Iterator[Fragment]:
        """Cut a shard. With the first one, it is seen that some sample has the files that the config names."""
        if unit == self.units()[0]:
            for _ in islice(self.records(), self.config.limit):
                if all(any(ending.partition(".")[0] == text for ending in self._seen) for text in self._texts):
                    break
        facts, end, start = self._files.facts(unit), self._files.size(unit), 0
        for stop in [*self._places(unit, size, end), end]:
            yield Fragment(unit, start, stop, digest=hashlib.sha256(f"{facts} {start} {stop}".encode()).hexdigest())
            start = stop

    def read(self, fragment: Fragment) -> Iterator[Record]:
        """The records of a shard, or of a part of one."""
        return self._shard(fragment.unit, fragment.start, fragment.stop)

    def _places(self, name: str, size: int, end: int) -> Iterator[int]:
        """Where a shard can be cut: behind every so many samples of a large one on a local disk."""
        if end <= _WHOLE or not isinstance(self._files.filesystem, fs.LocalFileSystem):
            return
        key, samples, files = None, 0, 0
        with self._open(name) as stream, suppress(TarDamage):  # told when what comes before it is read
            for member in members(stream, end):
                own = _key(member.name)
                if own is None:
                    continue
                files = files + 1 if own == key else 1
                if files == _MOST_FILES or not member.alone:
                    return
                if own != key:
                    if samples == size:
                        yield member.start
                        samples = 0
                    key, samples = own, samples + 1

    def read_image(self, location: str) -> bytes:
        """The file, untouched."""
        shard, offset, length, _ = parse_location(location)
        return self._ranges.read(shard, offset, length)

    def fingerprint(self) -> str:
        """Digest of the shards' names, sizes and times of change."""
        return self._files.fingerprint()

    def _shard(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        key, files, damage = None, {}, None
        with self._open(name) as stream:
            try:
                for member in members(stream, self._ranges.size(name), start):
                    if stop is not None and member.start >= stop:
                        break
                    own = _key(member.name)
                    if own is None:
                        continue
                    if own != key:
                        if files:
                            yield from one_each(self._record(name, key, files), self.config)
                        key, files = own, {}
                    ending = posixpath.basename(posixpath.normpath(member.name)).partition(".")[2]
                    if len(files) == _MOST_FILES:
                        raise TarDamage(f"a sample of more than {_MOST_FILES} files", member.offset)
                    content = self._content(name, member, ending.lower(), stream)
                    if ending.lower() in files:
                        content = EntryError(f"the sample has two files .{ending.lower()}")
                    files[ending.lower()] = content
            except TarDamage as error:
                damage = self._damage(name, error)
        if files:
            yield from one_each(self._record(name, key, files), self.config)
        if damage:
            yield Record(f"{name}[damaged]", self.config.label, problem=damage)
        self._ranges.forget()  # who goes on has read the last sample's images by now

    @contextmanager
    def _open(self, name: str):
        if isinstance(self._files.filesystem, fs.LocalFileSystem):
            with storage.open_input(self._files.filesystem, self._files.path(name)) as raw:
                yield io.BufferedReader(raw, _READ_AHEAD)
        else:
            yield RangeStream(self._ranges, name)

    def _damage(self, name: str, error: TarDamage) -> Problem:
        lost, of = self._files.lost(name, error.at, error.cut)
        detail = f"{name}: {error}; what follows there is lost, write the shard again"
        return Problem("shard_damaged", detail, lost, of)

    def _content(self, shard: str, member: Member, ending: str, stream) -> object:
        """The location of an image, the text or JSON of a file, or the EntryError that it is."""
        image = _NAMES_IMAGE.fullmatch(ending) is not None
        if not image and ending.partition(".")[0] not in self._texts:
            return None
        if member.link is not None:
            what = "sparse" if member.link == "a sparse file" else f"a link to {member.link}"
            return EntryError(f"the file .{ending} is {what}, not stored in the tar as it is")
        if image:
            return _Image(location(shard, member.offset, member.size, posixpath.basename(member.name)))
        if member.size > _LONGEST_TEXT:
            return EntryError(f"the file .{ending} has {member.size} bytes, over the limit of {_LONGEST_TEXT}")
        stream.seek(member.offset)
        data = stream.read(member.size)
        try:
            text = data.decode("utf-8-sig")
            return parse_json(text) if ending.endswith("json") else text
        except ValueError as error:
            return EntryError(f"the file .{ending} cannot be read: {error}")

    @property
    def _texts(self) -> set[str]:
        """First parts of the endings of the files that are read when listing."""
        fields = (self.config.conversation, self.config.question, self.config.answer, self.config.caption)
        return {field.partition(".")[0] for field in fields if field is not None}

    def _record(self, shard: str, key: str, files: dict[str, object]) -> Record:
        record_id = f"{shard.removesuffix('.tar')}/{key}"
        if len(self._seen) < _ENDINGS:
            self._seen |= dict.fromkeys(files)
        try:
            check_text("the sample's name", record_id)
            for content in files.values():
                if isinstance(content, EntryError):
                    raise content
            endings = sorted((e for e, content in files.items() if isinstance(content, _Image)), key=_number)
            images = [str(files[ending]) for ending in endings]
            if not self.config.text_only:
                self._check_images(files, len(images))
            turns = text_turns(self.config, lambda field: _field(files, field), record_id, len(images))
            return Record(record_id, self.config.label, images, turns)
        except EntryError as error:
            record_id = record_id.encode("utf-8", "replace").decode()
            return Record(record_id, self.config.label, problem=error.problem)

    def _check_images(self, files: dict[str, object], images: int) -> None:
        """Raise EntryError for a sample that lacks its image, or has video."""
        unread = next(filter(None, map(unread_file, () if images else files)), None)
        for content in files.values():
            if unread is None and isinstance(content, dict):
                unread = unread_key(content, (), images)
        if unread:
            raise EntryError(unread, "image_missing")
        if not images:
            has = ", ".join(f".{ending}" for ending in [*files][:10])
            raise EntryError(
                f"the sample has no image (its files: {has}); text_only: true takes such samples", "image_missing"
            )


def _key(name: str) -> str | None:
    """The sample that a file belongs to; None for one without a name or an ending."""
    folder, file = posixpath.split(posixpath.normpath(name))
    stem, dot, _ = file.partition(".")
    return posixpath.join(folder, stem) if stem and dot else None


class _Image(str):
    """An image's location, among the texts of a sample."""


def _number(ending: str) -> int:
    """Place of an image within its sample: 1 for k.1.jpg. Those without a number come first, as they stand."""
    first = ending.partition(".")[0]
    return int(first) if first.isdecimal() else -1


def _field(files: dict[str, object], field: str) -> object:
    """A member by its ending, or a key of a JSON member."""
    ending, keys = field, []
    while ending not in files:
        ending, dot, key = ending.rpartition(".")
        if not dot:
            raise EntryError(f"the sample has no file .{field.partition('.')[0]}")
        keys.insert(0, key)
    value = files[ending]
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise EntryError(f"the file .{ending} has no {key!r}")
        value = value[key]
    return value
