"""What a record must be to become a training sample. Each failure has a reason code, listed in `REASONS`.

Images go through the gate that training decodes with (mlmamba/images.py), so that an image that passes here cannot stop
a training run. A JPEG is decoded at an eighth of its size: its data is still read to the end, so the verdict is the
same (tests/unit/pipelines/test_image_check.py), in half the time.
"""

import errno
import time
from collections.abc import Callable, Sequence

from PIL.Image import Image

from mlmamba.conversation import ML_MAMBA, check_turns, clean
from mlmamba.images import LIMITS, ImageError, ImageLimits, open_image
from pipelines.sources.source import ImageMissing, Problem, Record, Source, shown_location
from pipelines.storage import NotReadable, TooLarge

REASONS = {
    "malformed": "the entry is not what the source's format asks for",
    "shard_damaged": "a tar or Parquet file cannot be read to its end; what could be read of it is used",
    "duplicate_id": "an earlier record of the source that is used has the same id",
    "duplicate_content": "an earlier record of the split has the same images and text, to the byte",
    "contaminated": "an image is, to the byte, one of an evaluation set's",
    "near_contaminated": "an image looks like one of an evaluation set's, as far as similar_evaluation_images asks",
    "role_order": "the turns do not alternate user, assistant, or there is no answer",
    "empty_turn": "a turn has no text, or there are no turns",
    "control_text": "a message holds a special token of the tokenizer or a mark of the prompt format",
    "placeholder_mismatch": "a placeholder is missing or extra: the turns do not show each image once",
    "too_long": "not even the first answer fits, or the recipe does not cut",
    "image_missing": "there is no such file",
    "image_format": "an image, but not of a format that the recipe accepts",
    "image_aspect": "one side is longer than the recipe's max_aspect times the other",
    "image_bomb": "more pixels than the recipe's max_pixels, an enormous file, or one made to take much memory",
    "image_truncated": "the file ends before the image does",
    "image_unreadable": "the file cannot be read or decoded",
}

# What a recipe asks to remove. Nothing is wrong with these records, so they do not count against `max_quarantined`.
REMOVED = ("duplicate_content", "contaminated", "near_contaminated")

_READ_TRIES = 3
_RETRY_SECONDS = 0.5
# What waiting does not mend: a name that is too long, links in a circle, no permission.
_LASTING = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EINVAL)


def check_record(
    record: Record, end_token: str = "<|endoftext|>", special_tokens: Sequence[str] = ()
) -> Problem | None:
    """The first thing wrong with a record's description and turns, or None. Reads no images.

    Args:
        record: to check.
        end_token: the tokenizer's, which must not stand in a message: it would end the turn there.
        special_tokens: the tokenizer's others, each of which would become one id that is no text.
    """
    if record.problem:
        return record.problem
    try:
        check_turns(record.turns)
    except ValueError as error:
        return Problem(_turn_reason(record), str(error))
    shown = sum(turn.images for turn in record.turns)
    if shown != len(record.images):
        return Problem("placeholder_mismatch", f"the turns show {shown} images, the record has {len(record.images)}")
    if len(record.turns) < 2:
        return Problem("role_order", "there is a question and no answer")
    for i, turn in enumerate(record.turns):
        for mark in (end_token, *ML_MAMBA.marks, *special_tokens):
            if mark in turn.text:
                return Problem("control_text", f"turn {i} ({turn.role}) holds {mark}")
    return None


def check_image(
    data: bytes, limits: ImageLimits = LIMITS, seen: Callable[[Image], None] | None = None
) -> Problem | None:
    """The first thing wrong with an encoded image, or None. Reads it to its end; of an animation, the first frame.

    Args:
        data: the file's content.
        limits: what is let through.
        seen: called with the decoded image, a JPEG at an eighth of its size.
    """
    try:
        image = open_image(data, limits, reduced=True)
    except ImageError as error:
        return Problem(error.reason, str(error))
    if seen:
        seen(image)
    return None


def read_images(
    record: Record, source: Source, limits: ImageLimits = LIMITS, seen: Callable[[Image], None] | None = None
) -> tuple[list[bytes], Problem | None]:
    """A record's encoded images and the first problem with them. The list is complete only without a problem.

    `seen` is called with each, as `check_image` decodes it.
    """
    images = []
    for location in record.images:
        try:
            data = read_with_patience(source, location)
        except ImageMissing as error:
            return images, Problem("image_missing", f"{shown_location(location)}: {error}")
        except (FileNotFoundError, NotADirectoryError):
            return images, Problem("image_missing", f"no file {shown_location(location)}")
        except IsADirectoryError:
            return images, Problem("image_missing", f"no file {shown_location(location)}: it is a folder")
        except TooLarge as error:
            return images, Problem("image_bomb", f"{shown_location(location)}: {error}")
        except NotReadable as error:
            remedy = "; to follow such links, set `links: anywhere` on the source" if "link" in str(error) else ""
            return images, Problem("image_unreadable", f"{shown_location(location)}: {error}{remedy}")
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or error  # which names the file once more
            return images, Problem("image_unreadable", f"{shown_location(location)}: {said}")
        problem = check_image(data, limits, seen)
        if problem:
            return images, Problem(problem.reason, f"{shown_location(location)}: {problem.detail}")
        images.append(data)
    return images, None


def read_with_patience(source: Source, location: str) -> bytes:
    """Read with retries: a store that stutters for a moment must not cost a good record its place."""
    for attempt in range(1, _READ_TRIES + 1):
        try:
            return source.read_image(location)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError as error:
            if attempt == _READ_TRIES or error.errno in _LASTING:
                raise
            time.sleep(_RETRY_SECONDS * attempt)
    raise AssertionError("not reached")


def _turn_reason(record: Record) -> str:
    """Code of the first rule of check_turns that is broken, turn by turn in its order."""
    for i, turn in enumerate(record.turns):
        if turn.role != ("assistant" if i % 2 else "user"):
            return "role_order"
        if not clean(turn.text):
            return "empty_turn"
        if turn.images and turn.role == "assistant":
            return "placeholder_mismatch"
    return "empty_turn"
