"""From what an annotations file says to turns and image paths, with a problem where it makes no sense.

Shared by the sources. Messages are {"from": "human" | "gpt", "value"} as in LLaVA, {"role": "user" | "assistant",
"content": text or parts} as in chat services, or {"user", "assistant"} pairs. Each `<image>` in a user's message shows
the record's next image in that turn.
"""

import hashlib
from dataclasses import replace

from mlmamba.conversation import IMAGE_TOKEN, Turn
from pipelines.sources.source import Problem

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
_FORMATS = (("from", "value", "'human' or 'gpt'"), ("role", "content", "'user' or 'assistant'"))


class EntryError(Exception):
    """An entry that is no record."""

    def __init__(self, detail: str, reason: str = "malformed"):
        super().__init__(detail)
        self.problem = Problem(reason, detail)


def conversation(
    messages: object, images: int, no_placeholders: str = "quarantine", name="conversations"
) -> list[Turn]:
    """The turns of a list of messages.

    Args:
        messages: from the annotations.
        images: images of the record.
        no_placeholders: as in `TextFields`.
        name: of the field, for errors.

    Raises:
        EntryError: the messages break the format, or do not show `images` images.
    """
    if not isinstance(messages, list):
        raise EntryError(f"{name} is a {type(messages).__name__}, expected a list")
    turns = [turn for i, message in enumerate(messages) for turn in _turns(f"{name}[{i}]", message)]
    for i, turn in enumerate(turns):
        if turn.role == "assistant" and IMAGE_TOKEN in turn.text:
            raise EntryError(f"turn {i} is the assistant's but has {IMAGE_TOKEN}", "placeholder_mismatch")
    shown = sum(turn.images for turn in turns)
    if not shown and images and turns and turns[0].role == "user" and no_placeholders == "first_turn":
        return [replace(turns[0], images=images), *turns[1:]]
    if shown != images:
        raise EntryError(
            f"the human turns have {shown} {IMAGE_TOKEN} but the entry has {images} images", "placeholder_mismatch"
        )
    return turns


def question_and_answer(question: object, answer: object, images: int) -> list[Turn]:
    """The turns of one question about all images. Raises EntryError."""
    for name, text in (("question", question), ("answer", answer)):
        check_text(name, text)
        if IMAGE_TOKEN in text:
            raise EntryError(f"the {name} has {IMAGE_TOKEN}, but shows its images without", "placeholder_mismatch")
    return [Turn("user", question, images), Turn("assistant", answer)]


def captioned(caption: object, prompts: list[str], record_id: str, images: int) -> list[Turn]:
    """The turns of a caption: one of the prompts, always the same for an id, and the caption. Raises EntryError."""
    check_text("caption", caption)
    choice = int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little") % len(prompts)
    return question_and_answer(prompts[choice], caption, images)


def text_turns(text, read, record_id: str, images: int) -> list[Turn]:
    """The turns that a config's text fields ask for.

    Args:
        text: a `TextFields`.
        read: function from a field's name to its value, None where there is none.
        record_id: for the choice of a prompt.
        images: images of the record.

    Raises:
        EntryError: as the functions above.
    """
    if text.conversation is not None:
        return conversation(read(text.conversation), images, text.no_placeholders, text.conversation)
    if text.question is not None:
        return question_and_answer(read(text.question), read(text.answer), images)
    return captioned(read(text.caption), text.prompts, record_id, images)


def check_text(name: str, value: object) -> None:
    """Raise EntryError unless the value is a string that the tokenizer and Arrow can store."""
    if not isinstance(value, str) or not is_text(value):
        what = "a string of other than valid Unicode" if isinstance(value, str) else type(value).__name__
        raise EntryError(f"{name} is not a string of valid Unicode (it is {what})")


def check_path(name: str, path: object) -> None:
    """Raise EntryError unless the value is a path that stays where the images are."""
    if not isinstance(path, str) or not path or not is_text(path) or "\0" in path:
        raise EntryError(f"{name} is {path!r}, expected a path")
    # Annotations come from elsewhere: they must not name files outside the images' folder.
    if path.startswith("/") or ".." in path.split("/"):
        raise EntryError(f"{name} {path!r} leaves the images folder; give a path relative to it")


def is_text(value: str) -> bool:
    """False for lone surrogates, which neither the tokenizer nor Arrow can store."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _turns(name: str, message: object) -> list[Turn]:
    """The one turn of a message, or the two of a pair."""
    if not isinstance(message, dict):
        raise EntryError(f"{name} is a {type(message).__name__}, expected an object")
    if "user" in message and "assistant" in message:
        return [_turn(name, role, message[role], role) for role in ("user", "assistant")]
    speaker, content, expected = _FORMATS["role" in message]
    role = message.get(speaker)
    if not isinstance(role, str) or role not in _ROLES:
        raise EntryError(f"{name}.{speaker} is {role!r}, expected {expected}")
    return [_turn(name, _ROLES[role], message.get(content), content)]


def _turn(name: str, role: str, content: object, field: str) -> Turn:
    if isinstance(content, list):
        content = "".join(_part(f"{name}.{field}[{i}]", part) for i, part in enumerate(content))
    check_text(f"{name}.{field}", content)
    return Turn(role, content, images=content.count(IMAGE_TOKEN) if role == "user" else 0)


def _part(name: str, part: object) -> str:
    """Text of one part of a message's content; an image is a placeholder."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        check_text(f"{name}.text", part.get("text"))
        return part["text"]
    if kind in ("image", "image_url"):
        return IMAGE_TOKEN
    raise EntryError(f"{name} is {kind or type(part).__name__}, expected text or image")
