"""Finding and reading a benchmark's published files, with a digest of what was read."""

import hashlib
import json
import os
import posixpath

from pyarrow import fs

from pipelines import storage
from pipelines.sources.pictures import open_pictures
from workflows.errors import UsageError


class Files:
    """The files of one benchmark.

    Args:
        benchmark: its name, for errors.
        data: folder, path or URI.
    """

    def __init__(self, benchmark: str, data: str):
        self.benchmark, self.data = benchmark, absolute(data)
        self._digest = hashlib.sha256()
        if not storage.exists(data):
            raise UsageError(f"{benchmark}: there is no folder {storage.shown(data)}; --data names the benchmark's")

    @property
    def digest(self) -> str:
        """Ten hex digits that change with the content of the files read so far."""
        return self._digest.hexdigest()[:10]

    def find(self, *places: str) -> str | None:
        """The first of these paths below the folder where there is a file."""
        uris = [storage.join(self.data, place) for place in places]
        return next((uri for uri in uris if storage.size(uri) is not None), None)

    def json(self, *places: str) -> object:
        """The content of the first of these files.

        Raises:
            UsageError: none is there, or it is not JSON.
        """
        uri = self._need(places)
        try:
            return json.loads(self._read(uri))
        except ValueError as error:
            raise UsageError(f"{storage.shown(uri)} is not JSON: {error}; fetch it again") from error

    def json_lines(self, *places: str) -> list[dict]:
        """The entries of the first of these files, which has one a line (or is one list).

        Raises:
            UsageError: none is there, or a line is not a JSON object.
        """
        uri = self._need(places)
        data = self._read(uri)
        try:
            if data.lstrip()[:1] == b"[":
                return [self.object(uri, entry) for entry in json.loads(data)]
            lines = enumerate(data.splitlines(), start=1)
            return [self.object(f"{uri}, line {i}", json.loads(line)) for i, line in lines if line.strip()]
        except ValueError as error:
            raise UsageError(f"{storage.shown(uri)} is not JSON lines: {error}; fetch it again") from error

    def object(self, name: str, entry: object) -> dict:
        """The entry if it is a JSON object. Raises UsageError."""
        if not isinstance(entry, dict):
            raise UsageError(f"{storage.shown(name)}: expected an object, found {type(entry).__name__}")
        return entry

    def pictures(self, images: str | None, *places: str) -> list["PictureFolder"]:
        """Where pictures may be: `images` if given, else those of the places below the folder that exist.

        Raises:
            UsageError: there is none.
        """
        uris = [images] if images else [storage.join(self.data, place) for place in places]
        found = [PictureFolder(uri) for uri in uris if storage.exists(uri)]
        if not found:
            looked = ", ".join(storage.shown(uri) for uri in uris)
            raise UsageError(f"{self.benchmark}: no pictures at {looked}; say where they are with --images")
        return found

    def _need(self, places: tuple[str, ...]) -> str:
        uri = self.find(*places)
        if uri is None:
            raise UsageError(
                f"{self.benchmark}: {storage.shown(self.data)} has no {' nor '.join(places)}; --data names the folder "
                "with the benchmark's files as they are published"
            )
        return uri

    def _read(self, uri: str) -> bytes:
        data = storage.read_bytes(uri)
        self._digest.update(hashlib.sha256(data).digest())
        return data


class PictureFolder:
    """A folder or zip of pictures whose names are listed once."""

    def __init__(self, uri: str):
        self.description = {"kind": "folder", "uri": absolute(uri)}
        filesystem, path = storage.open_fs(uri)
        self._archive = open_pictures(uri) if path.endswith(".zip") else None
        self._stem = posixpath.basename(path).removesuffix(".zip")
        self._names = set() if self._archive else _names(filesystem, path)

    def locate(self, name: str) -> str | None:
        """Location of the picture with this name, or None. In val2014.zip it may also be val2014/NAME."""
        if self._archive is None:
            return name if name in self._names else None
        return self._archive.locate(name) or self._archive.locate(f"{self._stem}/{name}")


def absolute(uri: str) -> str:
    """A local path made absolute: workers run in another folder."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def _names(filesystem: fs.FileSystem, folder: str) -> set[str]:
    """Paths of the files below a folder, relative to it."""
    infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    skip = len(folder.rstrip("/")) + 1
    return {info.path[skip:] for info in infos if info.type == fs.FileType.File}
