"""From what an annotations file says to turns and image paths, with a problem where it makes no sense.

Shared by the sources. Messages are {"from": "human" | "gpt", "value"} as in LLaVA, {"role": "user" | "assistant",
"content": text or parts} as in chat services, or {"user", "assistant"} pairs. Each `<image>` in a user's message shows
the record's next image in that turn.
"""

import hashlib
import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlmamba.conversation import IMAGE_TOKEN, Turn, clean
from pipelines.sources.source import Problem, Record
from pipelines.sources.unread import unread_tag

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
_SYSTEM = ("system", "developer")
_FORMATS = (("from", "value", "'human' or 'gpt'"), ("role", "content", "'user' or 'assistant'"))


class EntryError(Exception):
    """An entry that is no record."""

    def __init__(self, detail: str, reason: str = "malformed"):
        super().__init__(detail)
        self.problem = Problem(reason, detail)


@dataclass(frozen=True)
class Rules:
    """What a recipe says about messages; fields as in `config.TextFields`."""

    no_placeholders: str = "quarantine"
    system: str = "quarantine"
    prompt: str | None = None
    """What is asked where a message shows images and has no text."""

    @classmethod
    def of(cls, config) -> "Rules":
        """Those of a source's config."""
        return cls(config.no_placeholders, config.system)


def conversation(messages: object, images: int, rules: Rules = Rules(), name="conversations") -> list[Turn]:
    """The turns of a list of messages.

    Args:
        messages: from the annotations.
        images: images of the record.
        rules: of the recipe.
        name: of the field, for errors.

    Raises:
        EntryError: the messages break the format, or do not show `images` images.
    """
    if not isinstance(messages, list):
        raise EntryError(f"{name} is {_kind(messages)}, expected a list of messages")
    system, first = [], 0
    for i, message in enumerate(messages):
        text = _system_text(f"{name}[{i}]", message)
        if text is None:
            break
        if rules.system == "quarantine":
            raise EntryError(
                f"{name}[{i}] is the system's, which the prompt format has no place for; set system: drop to leave it "
                "out or system: first_turn to put it before the first question"
            )
        system.append(text)
        first = i + 1
    turns = [turn for i, message in enumerate(messages[first:], first) for turn in _turns(f"{name}[{i}]", message)]
    turns = [_asking(turn, rules) for turn in turns]
    if rules.system == "first_turn":
        turns = with_system(turns, "\n\n".join(filter(None, map(str.strip, system))))
    return check_shown(turns, images, rules)


def _asking(turn: Turn, rules: Rules) -> Turn:
    """The turn, with the rules' prompt for a text where it shows images alone."""
    if not turn.images or rules.prompt is None or clean(turn.text):
        return turn
    return replace(turn, text=IMAGE_TOKEN * turn.images + rules.prompt)


def with_system(turns: list[Turn], text: str) -> list[Turn]:
    """The turns with a system text before the first question, as the chat template and the server put it."""
    if not text or not turns or turns[0].role != "user":
        return turns
    first = replace(turns[0], text=f"{text}\n\n{turns[0].text.strip()}", instructions=len(text))
    return [first, *turns[1:]]


def check_shown(turns: list[Turn], images: int, rules: Rules) -> list[Turn]:
    """The turns, which show `images` images in all, or EntryError."""
    for i, turn in enumerate(turns):
        if turn.role == "assistant" and IMAGE_TOKEN in turn.text:
            raise EntryError(f"turn {i} is the assistant's but has {IMAGE_TOKEN}", "placeholder_mismatch")
    tag = unread_tag(turns, images)
    if tag:
        raise EntryError(tag, "image_missing")
    shown = sum(turn.images for turn in turns)
    if not shown and images and turns and turns[0].role == "user" and rules.no_placeholders == "first_turn":
        return [replace(turns[0], images=images), *turns[1:]]
    if shown != images:
        empty = next((i for i, turn in enumerate(turns) if not clean(turn.text)), None)
        if empty is not None:
            raise EntryError(f"turn {empty} ({turns[empty].role}) is empty", "empty_turn")
        hint = "" if shown else "; no_placeholders: first_turn shows them in the first turn"
        detail = f"the human turns have {shown} {IMAGE_TOKEN} but the entry has {images} images{hint}"
        raise EntryError(detail, "placeholder_mismatch")
    return turns


def question_and_answer(question: object, answer: object, images: int) -> list[Turn]:
    """The turns of one question about all images. Raises EntryError."""
    texts = []
    for name, value in (("question", question), ("answer", answer)):
        text = as_text(name, value)
        if IMAGE_TOKEN in text:
            reason = "placeholder_mismatch" if clean(text) else "empty_turn"
            raise EntryError(f"the {name} has {IMAGE_TOKEN}, but shows its images without", reason)
        texts.append(text)
    turns = [Turn("user", texts[0], images), Turn("assistant", texts[1])]
    tag = unread_tag(turns, images)
    if tag:
        raise EntryError(tag, "image_missing")
    return turns


def captioned(caption: object, prompts: list[str], record_id: str, images: int) -> list[Turn]:
    """The turns of a caption: one of the prompts, always the same for an id, and the caption. Raises EntryError.

    Of a list of captions, a pair of turns for each, which `one_each` takes apart.
    """
    if isinstance(caption, list) and caption:
        each = [captioned(text, prompts, f"{record_id}/{i}", images) for i, text in enumerate(caption, 1)]
        return [turn for turns in each for turn in turns]
    text = as_text("caption", caption)
    return question_and_answer(choose(prompts, record_id), text, images)


def choose(prompts: list[str], record_id: str) -> str:
    """One of the prompts, always the same for an id."""
    return prompts[int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little") % len(prompts)]


def one_each(record: Record, config) -> Iterator[Record]:
    """A record of several captions as one record of each, id/1, id/2 and so on; another as it is."""
    if config.caption is None or len(record.turns) <= 2:
        yield record
        return
    for i in range(0, len(record.turns), 2):
        yield replace(record, id=f"{record.id}/{i // 2 + 1}", turns=record.turns[i : i + 2])


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
        return conversation(read(text.conversation), images, Rules.of(text), text.conversation)
    if text.question is not None:
        return question_and_answer(read(text.question), read(text.answer), images)
    return captioned(read(text.caption), text.prompts, record_id, images)


def as_text(name: str, value: object) -> str:
    """The value as text: a number as it is written. Raises EntryError unless it is text or a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value):
        return str(value)
    check_text(name, value)
    return value


def check_text(name: str, value: object) -> None:
    """Raise EntryError unless the value is a string that the tokenizer and Arrow can store."""
    if not isinstance(value, str) or not is_text(value):
        what = "a string of other than valid Unicode" if isinstance(value, str) else _kind(value)
        raise EntryError(f"{name} is not a string of valid Unicode (it is {what})")


def check_path(name: str, path: object) -> None:
    """Raise EntryError unless the value is a path that stays where the images are."""
    if path is None or path == "":
        raise EntryError(f"{name} is {shown(path)}, expected a path", "image_missing")
    if not isinstance(path, str) or not is_text(path) or "\0" in path:
        raise EntryError(f"{name} is {shown(path)}, expected a path")
    if path.startswith("data:"):
        return
    if "://" in path:
        raise EntryError(
            f"{name} {shown(path)} is an address; images are not fetched: store them in files", "image_missing"
        )
    # Annotations come from elsewhere: they must not name files outside the images' folder.
    if path.startswith("/") or ".." in path.split("/"):
        raise EntryError(f"{name} {shown(path)} leaves the images folder; give a path relative to it")


def is_text(value: str) -> bool:
    """False for lone surrogates, which neither the tokenizer nor Arrow can store."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """A value for a message, shortened where it is long or nested deeply."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _system_text(name: str, message: object) -> str | None:
    """The text of a system message, None of another."""
    if not isinstance(message, dict):
        return None
    speaker, content, _ = _FORMATS["role" in message]
    role = message.get(speaker)
    if not isinstance(role, str) or role not in _SYSTEM:
        return None
    return _turn(name, "system", message.get(content), content).text


def _turns(name: str, message: object) -> list[Turn]:
    """The one turn of a message, or the two of a pair."""
    if not isinstance(message, dict):
        raise EntryError(f"{name} is {_kind(message)}, expected an object")
    if "user" in message and "assistant" in message:
        return [_turn(name, role, message[role], role) for role in ("user", "assistant")]
    speaker, content, expected = _FORMATS["role" in message]
    role = message.get(speaker)
    if isinstance(role, str) and role in _SYSTEM:
        raise EntryError(f"{name}.{speaker} is {role!r} behind the first turn; it can only come before it")
    if not isinstance(role, str) or role not in _ROLES:
        raise EntryError(f"{name}.{speaker} is {shown(role)}, expected {expected}")
    return [_turn(name, _ROLES[role], message.get(content), content)]


def _turn(name: str, role: str, content: object, field: str) -> Turn:
    if isinstance(content, list):
        content = "".join(_part(f"{name}.{field}[{i}]", part) for i, part in enumerate(content))
    text = as_text(f"{name}.{field}", content)
    return Turn(role, text, images=text.count(IMAGE_TOKEN) if role == "user" else 0)


def _part(name: str, part: object) -> str:
    """Text of one part of a message's content; an image is a placeholder."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        check_text(f"{name}.text", part.get("text"))
        return part["text"]
    if kind in ("image", "image_url"):
        return IMAGE_TOKEN
    raise EntryError(f"{name} is {kind if isinstance(kind, str) else _kind(part)}, expected text or image")
