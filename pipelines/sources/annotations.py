"""Sources with one file of annotations and their images in a folder or a zip.

`AnnotatedImages` opens both, `JsonAnnotations` reads JSON entries, and one kind of entry follows: a question each
(`Questions`). Conversations are in llava.py.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pyarrow as pa

from pipelines import storage
from pipelines.sources.entries import EntryError, check_path, question_and_answer, shown
from pipelines.sources.images import DATA_URI, decode_data_uri, open_images
from pipelines.sources.json_buffer import BrokenLine
from pipelines.sources.json_cut import LINES, LIST, Unclear, cut_json
from pipelines.sources.json_stream import one_object, read_entries, read_part
from pipelines.sources.source import Fragment, Listed, Record, in_few
from pipelines.sources.unread import unread_key

_CHUNK, _BUFFER = 1 << 22, 1 << 20
_KEYS = 1000  # different keys of entries that are remembered for an error


class AnnotatedImages(Listed):
    """A file (`PATH_FIELD` of the config) whose entries name images in the config's `images`."""

    PATH_FIELD = "annotations"

    def __init__(self, config):
        self.config = config
        self._keys: dict[str, None] = {}
        uri = getattr(config, self.PATH_FIELD).partition("?")[0]
        self._packed = uri.endswith((".gz", ".bz2", ".zst", ".lz4"))
        self._images = open_images(config.images, config.links) if config.images else None

    def read_image(self, location: str) -> bytes:
        """The image's file, untouched."""
        if location.startswith(DATA_URI):
            return decode_data_uri(location)
        return self._images.read(location)

    def fingerprint(self) -> str:
        """Digest of the annotations file (about a second per gigabyte from a local disk) and of a zip's directory."""
        digest = hashlib.sha256()
        with self.open_text() as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        digest.update(self._images.fingerprint().encode() if self._images else b"")
        return digest.hexdigest()

    def relative(self, path: object) -> object:
        """A path below the config's `images` relative to it, where the entry has it in full; others as they are."""
        root = (self.config.images or "").rstrip("/") + "/"
        if isinstance(path, str) and path.startswith("file://"):
            path = path.removeprefix("file://")
        if isinstance(path, str) and path.startswith("/") and "://" not in root:
            root = os.path.join(os.path.abspath(os.path.expanduser(root)), "")
        inside = isinstance(path, str) and path.startswith(root) and (path.startswith("/") or "://" in path)
        return path[len(root) :] if inside else path

    def locate(self, path: str) -> str:
        """Return the location of an image. Raises EntryError when a zip's directory does not list it."""
        if path.startswith(DATA_URI):
            return path
        if self._images is None:
            raise EntryError(
                f"the entry names {shown(path)} and the source has no `images` to find it in", "image_missing"
            )
        location = self._images.locate(path)
        if location is None:
            raise EntryError(f"{storage.shown(self.config.images)} has no member {path}", "image_missing")
        return location

    def open_text(self, part: Fragment | None = None):
        """Open the annotations as a stream of bytes, decompressed when the name ends in .gz.

        Args:
            part: only these bytes of it; of a list, in brackets.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: (on reading) the file is cut off or damaged; it is named.
        """
        uri = getattr(self.config, self.PATH_FIELD)
        filesystem, path = storage.open_fs(uri)
        try:
            in_place = part is not None and not self._packed
            stream = storage.open_input(filesystem, path, stream=not in_place)  # a stream decompresses .gz by itself
            return io.BufferedReader(_Named(stream, storage.shown(uri), part, in_place), _BUFFER)
        except storage.NotReadable as error:
            raise storage.NotReadable(f"source {self.config.label!r}, {self.PATH_FIELD}: {error}") from None
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"source {self.config.label!r} has no {self.PATH_FIELD} file {storage.shown(uri)}: "
                f"check `{self.PATH_FIELD}`"
            ) from error


class _Named(io.RawIOBase):
    """A stream, or a part of it, whose errors name its file."""

    def __init__(self, stream, name: str, part: Fragment | None, in_place: bool):
        self._stream, self._name = stream, name
        self._before, self._left, self._behind = b"", None, b""
        if part is None:
            return
        self._left = part.stop - part.start
        if part.unit == LIST:
            self._before, self._behind = b"[", b"]"
        if in_place:
            stream.seek(part.start)
        else:
            for at in range(0, part.start, _CHUNK):
                self._read(min(_CHUNK, part.start - at))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if self._before:
            data, self._before = self._before, b""
        elif self._left is None:
            data = self._read(len(buffer))
        elif self._left:
            data = self._read(min(len(buffer), self._left))
            if not data:
                raise OSError(f"{self._name} has become shorter while it was read: something writes to it")
            self._left -= len(data)
        else:
            data, self._behind = self._behind, b""
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except (OSError, pa.ArrowInvalid) as error:
            raise OSError(
                f"{self._name} cannot be read to its end ({error}): it is cut off or damaged, copy or write it again"
            ) from error

    def close(self) -> None:
        self._stream.close()
        super().close()


class JsonAnnotations(AnnotatedImages):
    """A source of the entries of a JSON list or JSONL file. Subclasses implement `name`, `fields` and `parse`."""

    def cut(self, unit: str, size: int) -> Iterator[Fragment]:
        """Cut by bytes, found without parsing; where they are unclear, by the number of the entry."""
        self._try_fields()
        images = self._images.fingerprint() if self._images else ""
        try:
            with self.open_text() as stream:
                made = cut_json(stream, size, self.config.limit)
        except Unclear:
            yield from super().cut(unit, size)
            return
        for fragment in in_few(made) if self._packed else made:
            digest = hashlib.sha256(f"{fragment.first} {fragment.digest} {images}".encode()).hexdigest()
            yield replace(fragment, digest=digest)

    def read(self, fragment: Fragment) -> Iterator[Record]:
        """The records of a fragment. Raises ValueError when it has not the entries that were counted."""
        if fragment.unit not in (LIST, LINES):
            yield from super().read(fragment)
            return
        number = fragment.first
        with self.open_text(fragment) as stream:
            encoding = "utf-8" if fragment.start else "utf-8-sig"
            text = io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape")
            for entry in read_part(text, storage.shown(self.config.annotations), fragment):
                yield self._record(number, entry)
                number += 1
        if number - fragment.first != fragment.records:
            for _ in self.records():  # which has the words for what is wrong, if it is the file
                pass
            raise ValueError(
                f"{storage.shown(self.config.annotations)} has {number - fragment.first} entries from line "
                f"{fragment.line} column {fragment.column} on where {fragment.records} were counted: it is not JSON, "
                "or something writes to it"
            )

    def _try_fields(self) -> None:
        """List until an entry has had each of the `fields`; raises what `records` raises when none has."""
        for _ in islice(self.records(), self.config.limit):
            if len(self._keys) >= _KEYS or all(self._keys.keys() & {*group} for group in self.fields()):
                return

    def name(self, entry: dict) -> object:
        """Return the entry's id, None for the number of the entry. Else a string or an integer, or the entry is bad."""
        raise NotImplementedError

    def fields(self) -> tuple[tuple[str, ...], ...]:
        """Keys that some entry has to have: of each group at least one."""
        return ()

    def parse(self, entry: dict, record_id: str) -> Record:
        """Turn an entry into its record. Raises EntryError."""
        raise NotImplementedError

    def records(self) -> Iterator[Record]:
        """List one record per entry, in the file's order.

        Raises:
            FileNotFoundError: no annotations file.
            ValueError: the file is a JSON list that breaks off or is not JSON, a zip cannot be read, or no entry has a
                field that the config names.
        """
        keys = self._keys = {}
        position = 0
        with self.open_text() as stream:
            # Bytes that are not UTF-8 become lone surrogates here, which are found in the entry that has them.
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
            for position, entry in enumerate(read_entries(text, storage.shown(self.config.annotations))):
                if isinstance(entry, dict) and len(keys) < _KEYS:
                    keys |= dict.fromkeys(entry)
                if position + 1 == self.config.limit:  # nobody asks for what comes after it
                    self._check_fields(keys, alone=False)
                yield self._record(position, entry)
        self._check_fields(keys, alone=position == 0)

    def _check_fields(self, keys: dict[str, None], alone: bool) -> None:
        """Raise ValueError when no entry has a field. `alone`: there was one entry, which may be the whole file."""
        for group in self.fields() if keys else ():
            if not keys.keys() & {*group} and len(keys) < _KEYS:
                if alone:
                    raise ValueError(one_object(storage.shown(self.config.annotations), [*keys]))
                raise ValueError(
                    f"source {self.config.label!r}: no entry has the field {' or '.join(group)}; the entries have "
                    f"{', '.join(map(str, [*keys][:20]))}. Check the fields that the recipe names"
                )

    def _record(self, position: int, entry: object) -> Record:
        record_id = f"{self.config.label}[{position}]"
        try:
            if isinstance(entry, BrokenLine):
                raise EntryError(entry.detail)
            if not isinstance(entry, dict):
                raise EntryError(f"the entry is a {type(entry).__name__}, expected an object")
            name = self.name(entry)
            if name is not None:
                if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
                    raise EntryError(f"id is {shown(name)}, expected a string")
                record_id = str(name).encode("utf-8", "replace").decode()
            return self.parse(entry, record_id)
        except EntryError as error:
            return Record(record_id, self.config.label, problem=error.problem)


class Questions(JsonAnnotations):
    """Reader of a `QuestionsSource`."""

    def name(self, entry: dict) -> object:
        """Return the entry's id, or its image's name when the config names no id field."""
        if self.config.id is None:
            return entry.get(self.config.image)
        if entry.get(self.config.id) is None:
            raise EntryError(f"{self.config.id} is {'null' if self.config.id in entry else 'missing'}")
        return entry[self.config.id]

    def fields(self) -> tuple[tuple[str, ...], ...]:
        """All that the config names; the image only where text alone is not wanted."""
        config = self.config
        image = None if config.text_only else config.image
        named = (image, config.question, config.answer, config.question_type, config.id)
        return tuple((field,) for field in named if field is not None)

    def parse(self, entry: dict, record_id: str) -> Record:
        """Turn an entry into its record. Raises EntryError."""
        config = self.config
        image, images = entry.get(config.image), []
        if image is not None:
            path = f"{image}{config.image_suffix}" if isinstance(image, str | int) else image
            path = self.relative(path)
            check_path(config.image, path)
            images = [path]
        if not config.text_only:
            own = (config.image, config.question, config.answer, config.id, config.question_type)
            problem = unread_key(entry, own, len(images))
            if problem is None and not images:
                what = "null" if config.image in entry else "missing"
                problem = f"{config.image} is {what}; text_only: true takes such entries as text"
            if problem:
                raise EntryError(problem, "image_missing")
        turns = question_and_answer(entry.get(config.question), entry.get(config.answer), len(images))
        kinds = None
        if config.question_type is not None:
            kind = entry.get(config.question_type)
            if not isinstance(kind, str):
                raise EntryError(f"{config.question_type} is {shown(kind)}, expected a string")
            kinds = [kind]
        return Record(record_id, config.label, [self.locate(path) for path in images], turns, kinds)
