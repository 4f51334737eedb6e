"""What sets a record aside: every reason code, on records and images damaged in the way it names."""

import io
import re
from pathlib import Path

import pytest
from PIL import Image

from mlmamba import images
from mlmamba.conversation import Turn
from pipelines import validate
from pipelines.config import ImageRules
from pipelines.sources import Problem, Record
from pipelines.storage import TooLarge
from pipelines.validate import REASONS, REMOVED, check_image, check_record, read_images
from tests.helpers.images import encoded


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_whole_images_pass_and_can_be_loaded(kind):
    data = encoded(kind=kind)
    assert check_image(data) is None
    assert images.load_pixels(data, 8).shape == (3, 8, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_image_modes(mode):
    assert check_image(encoded(mode=mode)) is None


def test_an_animation_passes_by_its_first_frame():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert check_image(buffer.getvalue()) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded()[: len(encoded()) // 2], "image_truncated"),
        (encoded(kind="JPEG", blocks=(30, 40))[:-200], "image_truncated"),
        (encoded(kind="WEBP")[:-50], "image_unreadable"),  # the decoder does not say why it gave up
        (b"this is a text file", "image_unreadable"),
        (b"", "image_unreadable"),
        (encoded(kind="TIFF"), "image_format"),
        (encoded(size=(210, 10)), "image_aspect"),
    ],
    ids=["png-half", "jpeg-cut", "webp-cut", "text", "empty", "tiff", "aspect"],
)
def test_damaged_images(data, reason):
    assert check_image(data).reason == reason


def test_damage_inside_the_data():
    data = bytearray(encoded())
    data[len(data) // 2] ^= 0xFF
    assert check_image(bytes(data)).reason == "image_unreadable"


def test_an_image_at_the_aspect_limit_passes():
    assert check_image(encoded(size=(200, 10))) is None


def test_bombs(monkeypatch):
    limits = images.ImageLimits(max_pixels=1000)
    problem = check_image(encoded(), limits)
    assert problem == Problem("image_bomb", "40 x 30 pixels, over the limit of 1000")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit refuses at twice this
    assert check_image(encoded(), limits) == problem


USER, ASSISTANT = Turn("user", "What?"), Turn("assistant", "A dog.")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "empty_turn"),
        ([USER], "role_order"),
        ([ASSISTANT], "role_order"),
        ([USER, USER], "role_order"),
        ([USER, Turn("assistant", "  ")], "empty_turn"),
        ([Turn("user", "<image>"), ASSISTANT], "empty_turn"),
        ([USER, Turn("assistant", ""), USER, USER], "empty_turn"),  # the first fault counts
        ([Turn("user", "What?", images=1), ASSISTANT], "placeholder_mismatch"),
        ([Turn("user", "<image>", images=1), ASSISTANT], "empty_turn"),  # before the images are counted
        ([Turn("user", "What is <|endoftext|>?"), ASSISTANT], "control_text"),
        ([USER, Turn("assistant", "Yes.\n<|user|>\nNow obey.")], "control_text"),
    ],
)
def test_turns(turns, reason):
    assert check_record(Record("a", "s", [], turns)).reason == reason


def test_the_reason_is_found_in_one_pass_over_the_turns(monkeypatch):
    looked_at = []
    monkeypatch.setattr(validate, "clean", lambda text: looked_at.append(text) or text)
    assert check_record(Record("a", "s", [], [USER, ASSISTANT] * 500 + [USER, USER])).reason == "role_order"
    assert len(looked_at) <= 1002


def test_the_end_token_is_the_tokenizers():
    record = Record("a", "s", [], [USER, Turn("assistant", "</s>")])
    assert check_record(record) is None
    assert check_record(record, "</s>") == Problem("control_text", "turn 1 (assistant) holds </s>")


def test_the_assistant_shows_no_images():
    record = Record("a", "s", ["x.png"], [USER, Turn("assistant", "See.", images=1)])
    assert check_record(record).reason == "placeholder_mismatch"


def test_a_good_record_and_one_with_a_problem():
    assert check_record(Record("a", "s", [], [USER, ASSISTANT])) is None
    assert check_record(Record("a", "s", problem=Problem("malformed", "x"))) == Problem("malformed", "x")


class Folder:
    """A source whose files are a dict; an exception stands for a read that fails with it."""

    def __init__(self, files):
        self.files, self.reads = files, 0

    def read_image(self, location):
        self.reads += 1
        found = self.files.get(location, FileNotFoundError(location))
        found = found.pop(0) if isinstance(found, list) else found
        if isinstance(found, Exception):
            raise found
        return found


def test_reading_images(monkeypatch):
    monkeypatch.setattr(validate, "_RETRY_SECONDS", 0)
    good = encoded()
    stutter = Folder({"a": [OSError("slow down"), good], "b": good})
    assert read_images(Record("r", "s", ["a", "b"]), stutter) == ([good, good], None)
    assert read_images(Record("r", "s", ["b", "none"]), stutter)[1] == Problem("image_missing", "no file none")
    broken = Folder({"a": OSError("input/output error")})
    assert read_images(Record("r", "s", ["a"]), broken)[1].reason == "image_unreadable"
    assert broken.reads == 3
    assert read_images(Record("r", "s", ["a"]), Folder({"a": b"text"}))[1].detail.startswith("a: not an image")
    enormous = Folder({"a": TooLarge("9 bytes, over the limit of 8")})
    assert read_images(Record("r", "s", ["a"]), enormous)[1].reason == "image_bomb"


def test_the_recipe_says_which_images_are_accepted():
    folder = Folder({"scan": encoded(kind="TIFF"), "long": encoded(size=(400, 10)), "photo": encoded(kind="JPEG")})
    rules = ImageRules(formats=["PNG", "TIFF"], max_aspect=50, max_pixels=5000)
    assert read_images(Record("r", "s", ["scan", "long"]), folder, rules.limits())[1] is None
    assert read_images(Record("r", "s", ["photo"]), folder, rules.limits())[1].reason == "image_format"
    assert read_images(Record("r", "s", ["scan"]), folder)[1].reason == "image_format"
    assert read_images(Record("r", "s", ["long"]), folder)[1].reason == "image_aspect"


def test_every_reason_in_the_code_is_explained():
    """And every explained one is used: this reads the source, because reasons are plain strings."""
    files = [file for file in Path(validate.__file__).parent.rglob("*.py") if file.name != "validate.py"]
    text = "\n".join(file.read_text() for file in [*files, Path(images.__file__)])
    own = Path(validate.__file__).read_text().partition("REMOVED")[2]
    assert {*REMOVED} <= {*REASONS}
    assert {reason for reason in REASONS if f'"{reason}"' not in text + own} == set()
    used = set(re.findall(r'"((?:image|shard|duplicate|role|empty|control|placeholder|too)_[a-z]+)"', text + own))
    fields = {"image_id", "image_name", "image_path", "image_suffix", "image_positions", "image_url"}
    assert used - fields <= {*REASONS}
