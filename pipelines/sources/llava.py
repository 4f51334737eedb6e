"""LLaVA's conversation format as a source.

An entry is {"id", "image": path | [paths] | absent, "conversations": [{"from": "human" | "gpt", "value"}]}. Each
`<image>` in a human value shows the entry's next picture in that turn. An entry that breaks this is yielded with a
problem, so that the others go on.
"""

from pipelines.sources.annotations import JsonAnnotations
from pipelines.sources.base import Record
from pipelines.sources.entries import check_path, conversation


class Llava(JsonAnnotations):
    """Reader of a `LlavaSource`."""

    def name(self, entry: dict) -> object:
        """The entry's id."""
        return entry.get("id")

    def parse(self, entry: dict, record_id: str) -> Record:
        """The record of an entry. Raises EntryError."""
        images = entry.get("image")
        images = [] if images is None else images if isinstance(images, list) else [images]
        for path in images:
            check_path("image", path)
        turns = conversation(entry.get("conversations"), len(images), self.config.no_placeholders)
        return Record(record_id, self.config.label, [self.locate(path) for path in images], turns)
