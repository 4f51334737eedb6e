"""What a record must be to become a training sample. Each failure has a reason code, listed in `REASONS`.

The picture check does everything that training will do except the resize, so that a picture that passes here cannot
stop a training run.
"""

import io
import time

from PIL import Image, ImageOps, UnidentifiedImageError

from mlmamba.conversation import check_turns
from pipelines.sources.base import Problem, Record, Source

REASONS = {
    "malformed": "the entry is not what the source's format asks for",
    "duplicate_id": "an earlier record of the split has the same id",
    "role_order": "the turns do not alternate user, assistant, or there is no answer",
    "empty_turn": "a turn has no text, or there are no turns",
    "placeholder_mismatch": "the pictures that the turns show are not as many as the record has",
    "too_long": "not even the first answer fits, or the recipe does not cut",
    "image_missing": "there is no such file",
    "image_format": "not one of the formats in FORMATS",
    "image_aspect": "one side is more than MAX_ASPECT times the other",
    "image_bomb": "more than MAX_PIXELS pixels",
    "image_truncated": "the file ends before the picture does",
    "image_unreadable": "the file cannot be read or decoded",
}

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF")  # MPO: JPEG as some cameras write it; the first frame counts
MAX_PIXELS = 64_000_000  # as in mlmamba.processing, which would refuse more when training decodes the picture
MAX_ASPECT = 20.0  # beyond this a square resize leaves stripes
_READ_TRIES = 3
_RETRY_SECONDS = 0.5


def check_record(record: Record) -> Problem | None:
    """The first thing wrong with a record's description and turns, or None. Reads no pictures."""
    if record.problem:
        return record.problem
    shown = sum(turn.images for turn in record.turns)
    if shown != len(record.images):
        return Problem("placeholder_mismatch", f"the turns show {shown} pictures, the record has {len(record.images)}")
    try:
        check_turns(record.turns)
    except ValueError as error:
        return Problem(_turn_reason(record), str(error))
    if len(record.turns) < 2:
        return Problem("role_order", "there is a question and no answer")
    return None


def check_image(data: bytes) -> Problem | None:
    """The first thing wrong with an encoded picture, or None. Decodes it fully; of an animation, the first frame."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if image.format not in FORMATS:
                return Problem("image_format", f"{image.format} is not one of {', '.join(FORMATS)}")
            if width * height > MAX_PIXELS:
                return Problem("image_bomb", f"{width} x {height} pixels, at most {MAX_PIXELS} are allowed")
            if max(width, height) > MAX_ASPECT * min(width, height):
                return Problem("image_aspect", f"{width} x {height} pixels, at most {MAX_ASPECT:g}:1 is allowed")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            image.convert("RGB")
    except Image.DecompressionBombError as error:
        return Problem("image_bomb", str(error))
    except UnidentifiedImageError:
        return Problem("image_unreadable", f"not a picture: {len(data)} bytes beginning {data[:8]!r}")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        reason = "image_truncated" if "truncated" in str(error).lower() else "image_unreadable"
        return Problem(reason, f"{type(error).__name__}: {error}")
    return None


def read_images(record: Record, source: Source) -> tuple[list[bytes], Problem | None]:
    """A record's encoded pictures and the first problem with them. The list is complete only without a problem."""
    pictures = []
    for location in record.images:
        try:
            data = _read(source, location)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return pictures, Problem("image_missing", f"no file {location}")
        except (OSError, ValueError) as error:
            return pictures, Problem("image_unreadable", f"{location}: {error}")
        problem = check_image(data)
        if problem:
            return pictures, Problem(problem.reason, f"{location}: {problem.detail}")
        pictures.append(data)
    return pictures, None


def _read(source: Source, location: str) -> bytes:
    """Read with retries: a store that stutters for a moment must not cost a good record its place."""
    for attempt in range(1, _READ_TRIES + 1):
        try:
            return source.read_image(location)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError:
            if attempt == _READ_TRIES:
                raise
            time.sleep(_RETRY_SECONDS * attempt)
    raise AssertionError("not reached")


def _turn_reason(record: Record) -> str:
    """Code of the first rule of check_turns that is broken: that of the last turn in the shortest bad beginning."""
    for i, turn in enumerate(record.turns):
        try:
            check_turns(record.turns[: i + 1])
        except ValueError:
            if turn.role != ("assistant" if i % 2 else "user"):
                return "role_order"
            return "placeholder_mismatch" if turn.images and turn.role == "assistant" else "empty_turn"
    return "empty_turn"
