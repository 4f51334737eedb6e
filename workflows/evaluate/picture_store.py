"""Where the pictures of an evaluation lie, described in a few JSON values so that workers and reports can open it.

{"kind": "folder", "uri": folder or zip}        a location is the path below it, or a zip member's place
{"kind": "source", "config": source config}     a location is the source's own
{"kind": "shards", "uri": data set, "split"}    a location is ROW/PICTURE of a packed row
"""

import json
from functools import lru_cache
from typing import Protocol

from pydantic import TypeAdapter

from pipelines.config import SourceConfig
from pipelines.packed import PackedDataset
from pipelines.sources import open_source
from pipelines.sources.pictures import open_pictures


class Store(Protocol):
    """A place for pictures."""

    def read(self, location: str) -> bytes:
        """The encoded picture. Raises OSError, ValueError."""


class SourceStore:
    """The pictures of one of the recipe's sources."""

    def __init__(self, config: dict):
        self._source = open_source(TypeAdapter(SourceConfig).validate_python(config))

    def read(self, location: str) -> bytes:
        """The picture's file."""
        return self._source.read_image(location)


class ShardStore:
    """The pictures in the packed rows of a data set."""

    def __init__(self, uri: str, split: str):
        self._rows = PackedDataset(uri, split)

    def read(self, location: str) -> bytes:
        """Picture of a location ROW/PICTURE."""
        row, picture = location.split("/")
        return self._rows[int(row)].images[int(picture)]


def open_store(description: dict) -> Store:
    """The store of a description; one process opens each once.

    Raises:
        ValueError: the description is of no kind that there is.
    """
    return _open(json.dumps(description, sort_keys=True))


@lru_cache(maxsize=8)
def _open(text: str) -> Store:
    description = json.loads(text)
    kind = description["kind"]
    if kind == "folder":
        return open_pictures(description["uri"])
    if kind == "source":
        return SourceStore(description["config"])
    if kind == "shards":
        return ShardStore(description["uri"], description["split"])
    raise ValueError(f"there is no kind of picture store {kind!r}; expected folder, source or shards")
