"""Conversations in JSON, with their images in a folder or a zip: LLaVA's layout and its relatives.

The messages stand under `conversations` or `messages`, the image under `image` (a path) or `images` (a list).
"""

from pipelines.sources.annotations import JsonAnnotations
from pipelines.sources.entries import EntryError, Rules, check_path, conversation
from pipelines.sources.source import Record
from pipelines.sources.unread import unread_key

MESSAGES = ("conversations", "messages")
IMAGES = ("image", "images")


class Llava(JsonAnnotations):
    """Reader of a `LlavaSource`."""

    def name(self, entry: dict) -> object:
        """Return the entry's id."""
        return entry.get("id")

    def fields(self) -> tuple[tuple[str, ...], ...]:
        """The messages. An image is not asked for: a list may be of text alone."""
        return (MESSAGES,)

    def parse(self, entry: dict, record_id: str) -> Record:
        """Turn an entry into its record. Raises EntryError."""
        images = self._paths(entry)
        unread = unread_key(entry, IMAGES, len(images))
        if unread and not self.config.text_only:
            raise EntryError(unread, "image_missing")
        name = next((name for name in MESSAGES if name in entry), MESSAGES[0])
        turns = conversation(entry.get(name), len(images), Rules.of(self.config), name)
        return Record(record_id, self.config.label, [self.locate(path) for path in images], turns)

    def _paths(self, entry: dict) -> list[str]:
        """The paths of an entry's images."""
        given = [name for name in IMAGES if entry.get(name) is not None]
        if not given:
            null = next((name for name in IMAGES if name in entry), None)
            if null and not self.config.text_only:
                raise EntryError(f"{null} is null; text_only: true takes such entries as text", "image_missing")
            return []
        lists = [value if isinstance(value := entry[name], list) else [value] for name in given]
        if len(lists) == 2 and lists[0] != lists[1]:
            raise EntryError("the entry has both image and images, and they are not the same")
        paths = [self.relative(path) for path in lists[0]]
        for path in paths:
            check_path(given[0], path)
        return paths
