"""Conversations in JSON, with their images in a folder or a zip: LLaVA's layout and its relatives.

The messages stand under `conversations` or `messages`, or as `prompt` and `completion`; the image under `image` (a
path), `images` (a list) or in the messages themselves, as a path or a data: URI. A system text may also stand under
`system`.
"""

from dataclasses import replace

from pipelines.sources.annotations import JsonAnnotations
from pipelines.sources.entries import EntryError, Rules, as_text, check_path, choose, conversation, shown, with_system
from pipelines.sources.source import Record
from pipelines.sources.unread import unread_key

MESSAGES = ("conversations", "messages")
PROMPT, COMPLETION = "prompt", "completion"
IMAGES = ("image", "images")


class Llava(JsonAnnotations):
    """Reader of a `LlavaSource`."""

    def name(self, entry: dict) -> object:
        """Return the entry's id."""
        return entry.get("id")

    def fields(self) -> tuple[tuple[str, ...], ...]:
        """The messages. An image is not asked for: a list may be of text alone."""
        kind = self.config.question_type
        return ((*MESSAGES, PROMPT), *([(kind,)] if kind else []))

    def parse(self, entry: dict, record_id: str) -> Record:
        """Turn an entry into its record. Raises EntryError."""
        name, messages = _messages(entry)
        images = self._paths(entry, _own_images(messages))
        unread = unread_key(entry, IMAGES, len(images))
        if unread and not self.config.text_only:
            raise EntryError(unread, "image_missing")
        rules = Rules.of(self.config)
        if self.config.prompts:
            rules = replace(rules, prompt=choose(self.config.prompts, record_id))
        turns = conversation(messages, len(images), rules, name)
        if entry.get("system"):
            turns = self._with_system(turns, entry["system"])
        kinds = self._kinds(entry, sum(turn.role == "user" for turn in turns))
        return Record(record_id, self.config.label, [self.locate(path) for path in images], turns, kinds)

    def _kinds(self, entry: dict, questions: int) -> list[str] | None:
        """The kind of each question, None where the source names no field for it. Raises EntryError."""
        name = self.config.question_type
        if name is None:
            return None
        given = entry.get(name)
        kinds = given if isinstance(given, list) else [given] * questions
        if len(kinds) != questions or not all(isinstance(kind, str) and kind for kind in kinds):
            found = shown(given) if name in entry else "missing"
            raise EntryError(f"{name} is {found}, expected a string, or a list of {questions}")
        return kinds

    def _with_system(self, turns: list, system: object) -> list:
        if self.config.system == "quarantine":
            raise EntryError("the entry has a system text; set system: drop or system: first_turn")
        return with_system(turns, as_text("system", system).strip()) if self.config.system == "first_turn" else turns

    def _paths(self, entry: dict, own: list[object]) -> list[str]:
        """The paths of an entry's images; `own` are those that its messages name, None where they leave that open."""
        given = [name for name in IMAGES if entry.get(name) is not None]
        if not given:
            null = next((name for name in IMAGES if name in entry), None)
            if null and not self.config.text_only and not any(own):
                raise EntryError(f"{null} is null; text_only: true takes such entries as text", "image_missing")
        lists = [value if isinstance(value := entry[name], list) else [value] for name in given]
        if len(lists) == 2 and lists[0] != lists[1]:
            raise EntryError("the entry has both image and images, and they are not the same")
        listed = list(lists[0]) if lists else []
        if any(own):
            rest = iter(listed)
            listed = [next(rest, None) if path is None else path for path in own]
            left = sum(1 for _ in rest)
            if left:
                raise EntryError(f"{given[0]} has {left} more images than the messages show", "placeholder_mismatch")
        paths = [self.relative(path.get("path") if isinstance(path, dict) else path) for path in listed]
        for path in paths:
            check_path(given[0] if given else "the message's image", path)
        return paths


def _messages(entry: dict) -> tuple[str, object]:
    """The name and content of an entry's list of messages."""
    name = next((name for name in MESSAGES if name in entry), None)
    if name or PROMPT not in entry:
        return name or MESSAGES[0], entry.get(name or MESSAGES[0])
    both = []
    for field, role in ((PROMPT, "user"), (COMPLETION, "assistant")):
        value = entry.get(field)
        both += value if isinstance(value, list) else [{"role": role, "content": value}]
    return f"{PROMPT} and {COMPLETION}", both


def _own_images(messages: object) -> list[object]:
    """What the images in the parts of messages say about where they are, None where nothing."""
    found = []
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image_url":
                url = part.get("image_url")
                found.append(url.get("url") if isinstance(url, dict) else url)
            elif kind == "image":
                where = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
                found.append(where)
            elif kind == "text" and isinstance(part.get("text"), str):
                found += [None] * part["text"].count("<image>")
    for path in found:
        if path is not None and not isinstance(path, str):
            raise EntryError(f"an image in the messages is {shown(path)}, expected a path or data: URI")
    return found
