"""Where the images of a source lie that has them in files of their own: a folder, or a zip of it."""

import base64
import posixpath
import unicodedata
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

from pipelines import storage
from pipelines.sources.files import MAX_FILE_BYTES, RangeReader, location, parse_location
from pipelines.sources.zip_index import ZipIndex, directory_digest, read_member


class Images(Protocol):
    """A place for images."""

    def locate(self, path: str) -> str | None:
        """The location of the image with this path, or None where it is known that there is none."""

    def read(self, location: str) -> bytes:
        """The image's file. Raises FileNotFoundError, OSError, ValueError."""

    def fingerprint(self) -> str:
        """Changes when `locate` gives other answers."""


def open_images(uri: str, links: str = "anywhere") -> Images:
    """The images in a folder or in a file that ends in .zip. `links` is as in SourceBase."""
    filesystem, path = storage.open_fs(uri)
    return Archive(filesystem, path, uri) if path.endswith(".zip") else Folder(filesystem, path, links)


DATA_URI = "data:"


def decode_data_uri(uri: str) -> bytes:
    """The content of a data: URI (RFC 2397). Raises ValueError, TooLarge."""
    head, comma, content = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("the data: URI is not in base64")
    if len(content) > MAX_FILE_BYTES:
        raise storage.TooLarge(f"the data: URI has {len(content)} characters, over the limit of {MAX_FILE_BYTES}")
    return base64.b64decode(content, validate=True)


class Folder:
    """Images in a folder and the folders below it. A location is the path."""

    def __init__(self, filesystem, folder: str, links: str):
        self._filesystem, self._folder = filesystem, folder
        self._inside = folder if links == "inside" else None

    def locate(self, path: str) -> str:
        """The path: whether the file is there shows when it is read."""
        return path

    def read(self, location: str) -> bytes:
        """The whole file. Its name may be composed otherwise (NFC, NFD), as those of files from a Mac are."""
        forms = [location, *(unicodedata.normalize(form, location) for form in ("NFC", "NFD"))]
        for form in dict.fromkeys(forms[:1] if location.isascii() else forms):
            try:
                path = posixpath.join(self._folder, form)
                return storage.read_path(self._filesystem, path, MAX_FILE_BYTES, self._inside)
            except FileNotFoundError as error:
                missing = error
        raise missing

    def fingerprint(self) -> str:
        """The same for every folder."""
        return ""


class Archive:
    """Images in a zip, read by range. Who only reads locations does without the archive's directory."""

    def __init__(self, filesystem, path: str, uri: str):
        folder, self._name = posixpath.split(path)
        self._filesystem, self._path, self._uri = filesystem, path, uri
        self._ranges = RangeReader(filesystem, folder)

    def locate(self, path: str) -> str | None:
        """Where the member is."""
        found = self._index.find(path)
        return found and location(self._name, *found)

    def read(self, location: str) -> bytes:
        """The member, unpacked."""
        _, offset, length, name = parse_location(location)
        return read_member(
            lambda at, size: self._ranges.read(self._name, at, size), offset, length, name, MAX_FILE_BYTES
        )

    def fingerprint(self) -> str:
        """Of the archive's directory."""
        return self._open(directory_digest)

    @cached_property
    def _index(self) -> ZipIndex:
        return self._open(ZipIndex)

    def _open(self, use: Callable):
        """What a function makes of the open archive."""
        try:
            with storage.open_input(self._filesystem, self._path) as file:
                return use(file)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no archive {storage.shown(self._uri)}") from error
        except storage.NotReadable:
            raise
        except ValueError as error:
            raise ValueError(f"the archive {storage.shown(self._uri)} cannot be read: {error}") from error
