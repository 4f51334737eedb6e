"""Keys and tags of a record that name images, video or sound which its source does not read.

A record whose image is not read would teach the model to answer without looking, so it is set aside with the name.
Where images are read, another key about them (`image_id` beside `image`) is no more than a remark.
"""

import re
from collections.abc import Collection, Iterable

from mlmamba.conversation import Turn

_PARTS = r"(?:_?(?:paths?|files?|file_?names?|urls?|uris?|names?|list|ids?|bytes|data|base64|b64|\d+))?"
_IMAGE_KEY = re.compile(rf"(?:input_|source_|query_)?(?:images?|imgs?|pictures?|pics?|photos?|frames?){_PARTS}")
_OTHER_KEY = re.compile(r"(?:input_)?(?:videos?|audios?|clips?)(?:_?(?:paths?|files?|file_?names?|urls?|uris?|list))?")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")

_IMAGE_TAGS = (
    r"<(?:img|ImageHere|image[ _-]?(?:\d+|placeholder|pad|start|patch|end|soft_token)|im_(?:patch|placeholder))>"
    r"|<\|(?:image|image_?\d+|img|vision_start|image_pad|image_start)\|>|\[(?:IMG|IMAGE)\]"
)
_OTHER_TAGS = r"<(?:video|audio)(?:[ _-]?\d+)?>|<\|(?:video|audio|video_pad|audio_start)\|>"
_ENDINGS = frozenset(["mp4", "avi", "mov", "mkv", "webm", "m4v", "mpg", "mpeg", "wav", "mp3", "flac", "ogg"])
_IMAGE_ENDINGS = frozenset(["heic", "heif", "avif", "jxl", "svg", "jfif", "psd", "cr2", "nef", "dng", "pgm", "pbm"])


def unread_key(entry: dict, read: Collection[str], images: int) -> str | None:
    """What is wrong with an entry that names what is not read, or None.

    Args:
        entry: as the file has it.
        read: keys that the source reads.
        images: how many images were read from them.
    """
    for key, value in entry.items():
        if key in read or not isinstance(key, str):
            continue
        name = _HUMP.sub("_", key).lower()
        if _IMAGE_KEY.fullmatch(name) and not images and (value is None or _names_something(name, value)):
            return f"the entry has {key}, which names an image and is not read; it has no image that is read"
        if _OTHER_KEY.fullmatch(name) and _names_something(name, value):
            return f"the entry has {key}, which names video or sound; only images are read"
    return None


def unread_tag(turns: Iterable[Turn], images: int) -> str | None:
    """What is wrong with turns that show, by a tag of another project, what is not read, or None.

    A tag counts where it stands alone at the start of a line or ends the message: in the middle of a sentence, or as
    HTML with its closing tag, it is what the text is about.
    """
    for i, turn in enumerate(turns):
        if turn.role != "user":
            continue
        for tags, what in ((_OTHER_TAGS, "video or sound"), *([] if images else [(_IMAGE_TAGS, "an image")])):
            found = re.search(rf"^[ \t]*({tags})|({tags})\s*\Z", turn.text, re.MULTILINE)
            tag = found and (found[1] or found[2])
            if tag and not (what != "an image" and f"</{tag[1:]}" in turn.text):
                return f"turn {i} has {tag}, which stands for {what} that is not read"
    return None


def unread_file(ending: str) -> str | None:
    """What is wrong with a sample's file that has this ending, or None where it names neither image nor video."""
    last = ending.rpartition(".")[2]
    if last in _ENDINGS:
        return f"the sample has a file .{ending}, which is video or sound; only images are read"
    if last in _IMAGE_ENDINGS:
        return f"the sample has a file .{ending}, an image in a format that is not read"
    return None


def _names_something(name: str, value: object) -> bool:
    """False for nothing and for what only counts: `frames: 8`."""
    if isinstance(value, bool | int | float):
        return not isinstance(value, bool) and name.endswith(("id", "name"))
    return bool(value)
