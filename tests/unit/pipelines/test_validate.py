"""What sets a record aside: every reason code, on records and images damaged in the way it names."""

import io
import os
import re
import socket
from pathlib import Path

import pytest
from PIL import Image

from mlmamba import images
from mlmamba.conversation import Turn
from pipelines import validate
from pipelines.config import ImageRules
from pipelines.source_config import LlavaSource
from pipelines.sources import Problem, Record
from pipelines.sources.images import open_images
from pipelines.storage import NotReadable, TooLarge
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


@pytest.fixture
def hostile_folder(tmp_path, monkeypatch):
    """A folder with one good image among what should not be there; waiting for any of it fails the test."""
    monkeypatch.setattr(validate.time, "sleep", lambda seconds: pytest.fail("it waited to try again"))
    folder, outside = tmp_path / "images", tmp_path / "outside"
    for place in (folder, outside, folder / "sub", folder / "folder.png"):
        place.mkdir()
    good = encoded()
    for file in (folder / "good.png", folder / "sub/good.png", outside / "secret.png"):
        file.write_bytes(good)
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "tty.png").symlink_to("/dev/tty")
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "linked").symlink_to(outside)
    (folder / "inside.png").symlink_to("sub/good.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "gone.png").symlink_to("nothing.png")
    (folder / "empty.png").touch()
    with open(folder / "sparse.png", "wb") as sparse:
        sparse.truncate(1 << 40)
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(folder)
    server.bind("socket.png")
    yield folder
    server.close()


HOSTILE = {
    "pipe.png": ("image_unreadable", "it is a pipe and no file"),
    "socket.png": ("image_unreadable", "it is a socket and no file"),
    "device.png": ("image_unreadable", "a symbolic link that leads out of its folder, to /dev/zero"),
    "tty.png": ("image_unreadable", "leads out of its folder, to /dev/tty"),
    "link.png": ("image_unreadable", "set `links: anywhere` on the source"),
    "linked/secret.png": ("image_unreadable", "leads out of its folder"),
    "circle.png": ("image_unreadable", "Too many levels of symbolic links"),
    "gone.png": ("image_missing", "no file gone.png"),
    "folder.png": ("image_missing", "it is a folder"),
    "good.png/more.png": ("image_missing", "no file good.png/more.png"),
    "empty.png": ("image_unreadable", "not an image but an empty file"),
    "sparse.png": ("image_bomb", "over the limit of"),
    "n" * 300 + ".png": ("image_unreadable", "(304 characters): File name too long"),
    "n" * 9000 + ".png": ("image_unreadable", "(9004 characters): File name too long"),
    "zero\0.png": ("image_unreadable", "null"),
    "half \ud800.png": ("image_unreadable", ""),
}


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_what_should_not_be_among_images_is_set_aside_at_once(hostile_folder, name):
    source = LlavaSource(type="llava", annotations="x.json", images=str(hostile_folder))
    files, (reason, said) = open_images(source.images, source.links), HOSTILE[name]
    files.read_image = files.read
    assert read_images(Record("r", "s", ["good.png", "inside.png"]), files)[1] is None
    problem = read_images(Record("r", "s", [name]), files)[1]
    assert (problem.reason, said in problem.detail) == (reason, True), problem.detail
    assert len(problem.detail) < 400


def test_links_are_followed_where_the_source_says_so(hostile_folder):
    files = open_images(str(hostile_folder), "anywhere")
    assert files.read("link.png") == files.read("linked/secret.png") == encoded()
    with pytest.raises(NotReadable, match="it is a device and no file"):
        files.read("device.png")


def test_the_folder_itself_may_be_a_link(hostile_folder, tmp_path):
    (tmp_path / "again").symlink_to(hostile_folder)
    assert open_images(str(tmp_path / "again"), "inside").read("inside.png") == encoded()


def test_a_file_that_is_written_to_meanwhile_is_not_taken_for_whole(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded())
    files = open_images(str(tmp_path), "inside")
    status = os.stat(tmp_path / "a.png")
    for size in (status.st_size - 1, status.st_size + 1):  # it grows, it shrinks
        told = os.stat_result((*status[:6], size, *status[7:]))
        monkeypatch.setattr(os, "fstat", lambda descriptor, told=told: told)
        with pytest.raises(OSError, match="something writes to it"):
            files.read("a.png")


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
