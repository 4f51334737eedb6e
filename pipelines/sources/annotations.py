"""Sources with one file of annotations and their images in a folder or a zip.

`AnnotatedImages` opens both, `JsonAnnotations` reads JSON entries, and two kinds of entry follow: LLaVA's conversations
(`Llava`) and one question per entry (`Questions`).
"""

import hashlib
import io
from collections.abc import Iterator

from pipelines import storage
from pipelines.sources.entries import EntryError, check_path, conversation, question_and_answer
from pipelines.sources.images import open_images
from pipelines.sources.json_stream import BrokenLine, read_entries
from pipelines.sources.source import Record

_CHUNK = 1 << 22


class AnnotatedImages:
    """A file (`PATH_FIELD` of the config) whose entries name images in the config's `images`."""

    PATH_FIELD = "annotations"

    def __init__(self, config):
        self.config = config
        self._images = open_images(config.images)

    def read_image(self, location: str) -> bytes:
        """The image's file, untouched."""
        return self._images.read(location)

    def fingerprint(self) -> str:
        """Digest of the annotations file (about a second per gigabyte from a local disk) and of a zip's directory."""
        digest = hashlib.sha256()
        with self.open_text() as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        digest.update(self._images.fingerprint().encode())
        return digest.hexdigest()

    def locate(self, path: str) -> str:
        """Return the location of an image. Raises EntryError when a zip's directory does not list it."""
        location = self._images.locate(path)
        if location is None:
            raise EntryError(f"{storage.shown(self.config.images)} has no member {path}", "image_missing")
        return location

    def open_text(self):
        """Open the annotations as a stream of bytes, decompressed when the name ends in .gz.

        Raises:
            FileNotFoundError: there is no such file.
        """
        uri = getattr(self.config, self.PATH_FIELD)
        filesystem, path = storage.open_fs(uri)
        try:
            return filesystem.open_input_stream(path)  # decompresses .gz by itself
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"source {self.config.label!r} has no {self.PATH_FIELD} file {storage.shown(uri)}: "
                f"check `{self.PATH_FIELD}`"
            ) from error


class JsonAnnotations(AnnotatedImages):
    """A source of the entries of a JSON list or JSONL file. Subclasses implement `name` and `parse`."""

    def name(self, entry: dict) -> object:
        """Return the entry's id. Anything but a string or an integer is reported as a bad entry."""
        raise NotImplementedError

    def parse(self, entry: dict, record_id: str) -> Record:
        """Turn an entry into its record. Raises EntryError."""
        raise NotImplementedError

    def records(self) -> Iterator[Record]:
        """List one record per entry, in the file's order.

        Raises:
            FileNotFoundError: no annotations file.
            ValueError: the file is a JSON list that breaks off or is not JSON, or a zip cannot be read.
        """
        with self.open_text() as stream:
            # Bytes that are not UTF-8 become lone surrogates here, which are found in the entry that has them.
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
            for position, entry in enumerate(read_entries(text, storage.shown(self.config.annotations))):
                yield self._record(position, entry)

    def _record(self, position: int, entry: object) -> Record:
        record_id = f"{self.config.label}[{position}]"
        try:
            if isinstance(entry, BrokenLine):
                raise EntryError(entry.detail)
            if not isinstance(entry, dict):
                raise EntryError(f"the entry is a {type(entry).__name__}, expected an object")
            name = self.name(entry)
            if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
                raise EntryError(f"id is {name!r}, expected a string")
            record_id = str(name).encode("utf-8", "replace").decode()
            return self.parse(entry, record_id)
        except EntryError as error:
            return Record(record_id, self.config.label, problem=error.problem)


class Llava(JsonAnnotations):
    """Reader of a `LlavaSource`."""

    def name(self, entry: dict) -> object:
        """Return the entry's id."""
        return entry.get("id")

    def parse(self, entry: dict, record_id: str) -> Record:
        """Turn an entry into its record. Raises EntryError."""
        images = entry.get("image")
        images = [] if images is None else images if isinstance(images, list) else [images]
        for path in images:
            check_path("image", path)
        turns = conversation(entry.get("conversations"), len(images), self.config.no_placeholders)
        return Record(record_id, self.config.label, [self.locate(path) for path in images], turns)


class Questions(JsonAnnotations):
    """Reader of a `QuestionsSource`."""

    def name(self, entry: dict) -> object:
        """Return the entry's id, or its image's name when the config names no id field."""
        return entry.get(self.config.id or self.config.image)

    def parse(self, entry: dict, record_id: str) -> Record:
        """Turn an entry into its record. Raises EntryError."""
        image, images = entry.get(self.config.image), []
        if image is not None:
            path = f"{image}{self.config.image_suffix}" if isinstance(image, str | int) else image
            check_path(self.config.image, path)
            images = [path]
        turns = question_and_answer(entry.get(self.config.question), entry.get(self.config.answer), len(images))
        kinds = None
        if self.config.question_type is not None:
            kind = entry.get(self.config.question_type)
            if not isinstance(kind, str):
                raise EntryError(f"{self.config.question_type} is {kind!r}, expected a string")
            kinds = [kind]
        return Record(record_id, self.config.label, [self.locate(path) for path in images], turns, kinds)
