"""LLaVA's conversation format as a source.

An entry is {"id", "image": path | [paths] | absent, "conversations": [{"from": "human" | "gpt", "value"}]}. Each
`<image>` in a human value shows the entry's next picture in that turn. An entry that breaks this is yielded with a
problem, so that the others go on.
"""

import hashlib
import io
import posixpath
from collections.abc import Iterator
from dataclasses import replace

from mlmamba.conversation import IMAGE_TOKEN, Turn
from pipelines import storage
from pipelines.config import LlavaSource
from pipelines.sources.base import Problem, Record
from pipelines.sources.json_stream import BrokenLine, read_entries

_ROLES = {"human": "user", "gpt": "assistant"}


class Llava:
    """Reader of a `LlavaSource`."""

    def __init__(self, config: LlavaSource):
        self.config = config
        self._images, self._folder = storage.open_fs(config.images)

    def records(self) -> Iterator[Record]:
        """One record per entry, in the file's order.

        Raises:
            FileNotFoundError: no annotations file.
            ValueError: the file is a JSON list that breaks off or is not JSON.
        """
        times_seen: dict[str, int] = {}
        with self._open_annotations() as stream:
            # Bytes that are not UTF-8 become lone surrogates here, which _parse finds in the entry that has them.
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
            for position, entry in enumerate(read_entries(text, storage.shown(self.config.annotations))):
                if position == self.config.limit:
                    return
                record = self._record(position, entry)
                if self.config.repeated_ids == "number":
                    times = times_seen[record.id] = times_seen.get(record.id, 0) + 1
                    if times > 1:
                        record = replace(record, id=f"{record.id}#{times}")
                yield record

    def read_image(self, location: str) -> bytes:
        """The picture's file, untouched."""
        return storage.read_path(self._images, posixpath.join(self._folder, location))

    def fingerprint(self) -> str:
        """Digest of the annotations file (about a second per gigabyte from a local disk)."""
        digest = hashlib.sha256()
        with self._open_annotations() as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()

    def _open_annotations(self):
        filesystem, path = storage.open_fs(self.config.annotations)
        try:
            return filesystem.open_input_stream(path)  # decompresses .gz by itself
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"source {self.config.label!r} has no annotations file {storage.shown(self.config.annotations)}: "
                "check `annotations`"
            ) from error

    def _record(self, position: int, entry: object) -> Record:
        name = f"{self.config.label}[{position}]"
        if isinstance(entry, dict) and isinstance(entry.get("id"), str | int) and entry["id"] != "":
            name = str(entry["id"]).encode("utf-8", "replace").decode()
        try:
            images, turns = _parse(entry)
        except _EntryError as error:
            return Record(name, self.config.label, problem=error.problem)
        return Record(name, self.config.label, images, turns)


class _EntryError(Exception):
    def __init__(self, detail: str, reason: str = "malformed"):
        super().__init__(detail)
        self.problem = Problem(reason, detail)


def _parse(entry: object) -> tuple[list[str], list[Turn]]:
    if isinstance(entry, BrokenLine):
        raise _EntryError(entry.detail)
    if not isinstance(entry, dict):
        raise _EntryError(f"the entry is a {type(entry).__name__}, expected an object")
    if not isinstance(entry.get("id"), str | int) or entry["id"] == "":
        raise _EntryError(f"id is {entry.get('id')!r}, expected a string")
    images = entry.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    for location in images:
        _check_location(location)
    conversation = entry.get("conversations")
    if not isinstance(conversation, list):
        raise _EntryError(f"conversations is a {type(conversation).__name__}, expected a list")
    turns = [_turn(i, message) for i, message in enumerate(conversation)]
    placeholders = sum(turn.images for turn in turns)
    if placeholders != len(images):
        raise _EntryError(
            f"the human turns have {placeholders} {IMAGE_TOKEN} but the entry has {len(images)} pictures",
            "placeholder_mismatch",
        )
    return images, turns


def _check_location(location: object) -> None:
    if not isinstance(location, str) or not location or not _is_text(location):
        raise _EntryError(f"image is {location!r}, expected a path")
    # Annotations come from elsewhere: they must not name files outside the pictures' folder.
    if location.startswith("/") or ".." in location.split("/"):
        raise _EntryError(f"image {location!r} leaves the images folder; give a path relative to it")


def _turn(i: int, message: object) -> Turn:
    if not isinstance(message, dict):
        raise _EntryError(f"conversations[{i}] is a {type(message).__name__}, expected an object")
    speaker, value = message.get("from"), message.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise _EntryError(f"conversations[{i}].from is {speaker!r}, expected 'human' or 'gpt'")
    if not isinstance(value, str) or not _is_text(value):
        raise _EntryError(f"conversations[{i}].value is not a string of valid Unicode")
    role = _ROLES[speaker]
    return Turn(role, value, images=value.count(IMAGE_TOKEN) if role == "user" else 0)


def _is_text(value: str) -> bool:
    """False for lone surrogates, which neither the tokenizer nor Arrow can store."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
