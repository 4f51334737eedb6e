"""Messages to turns and images: order, system text, and every way in which an image can be wrong."""

import base64
import io
import json
import struct
import textwrap
import zlib

import numpy as np
import pytest
from PIL import Image

from mlmamba.conversation import Turn
from mlmamba.images import as_image, load_pixels, to_pixels
from pipelines.validate import check_image
from tests.helpers.images import encoded, image
from tests.helpers.serve_client import data_uri
from workflows.serve import messages
from workflows.serve.messages import read_messages
from workflows.serve.openai import ApiError, parse_request
from workflows.serve.options import Limits
from workflows.verbs import chat


def text(value):
    return {"type": "text", "text": value}


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def read_lazily(*sent, limits=None, max_images=4):
    body = {"messages": [{"role": role, "content": content} for role, content in sent]}
    turns, images = read_messages(parse_request(json.dumps(body).encode()).messages, limits or Limits(), max_images)
    return turns, iter(images)


def read(*sent, **kwargs):
    turns, images = read_lazily(*sent, **kwargs)
    return turns, list(images)


def refused(*sent, **kwargs):
    with pytest.raises(ApiError) as caught:
        read(*sent, **kwargs)
    assert caught.value.status == 400
    return caught.value


def test_a_conversation_with_images():
    red, blue = data_uri(encoded()), data_uri(encoded(1, "JPEG", (4, 4)))
    turns, images = read(
        ("user", [text("look at"), image_part(red), text("this"), image_part(blue)]),
        ("assistant", "a square"),
        ("user", [image_part(red), text("sure?")]),
    )
    assert turns == [
        Turn("user", "look at\nthis", images=2),
        Turn("assistant", "a square"),
        Turn("user", "sure?", images=1),
    ]
    assert [image.size for image in images] == [(40, 30), (4, 4), (40, 30)]
    assert images[0].getpixel((0, 0)) == image().getpixel((0, 0))


def test_system_text_opens_the_first_user_turn():
    turns, _ = read(
        ("system", "Be brief."), ("developer", [text("In English.")]), ("system", ""), ("user", "what?"),
        ("assistant", "a circle"), ("user", "sure?"),
    )  # fmt: skip
    assert turns[0] == Turn("user", "Be brief.\n\nIn English.\n\nwhat?")
    assert turns[2] == Turn("user", "sure?")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["assistant"], "messages\\[0\\] has role 'assistant'"),
        (["user", "user"], "messages\\[1\\] has role 'user'"),
        (["system", "user", "assistant", "assistant"], "messages\\[3\\] has role 'assistant'"),
        (["user", "assistant"], "last message must be the user's"),
        (["system"], "last message must be the user's"),
        (["user", "system", "user"], "before all others"),
    ],
)
def test_roles_out_of_order(roles, message):
    error = refused(*[(role, "words") for role in roles])
    assert error.code == "role_order"
    with pytest.raises(ApiError, match=message):
        raise error


@pytest.mark.parametrize("content", ["", " \n", [], [text("")], None])
def test_a_question_without_text_and_image(content):
    assert refused(("user", content)).code == "empty_message"


def test_an_image_alone_is_a_question():
    turns, images = read(("user", [image_part(data_uri(encoded()))]))
    assert turns == [Turn("user", "", images=1)]
    assert len(list(images)) == 1


@pytest.mark.parametrize("content", ["", " ", None, []])
def test_an_answer_that_was_empty_may_stand_in_the_history(content):
    """A stop string first makes one, and clients send it back as they got it."""
    turns, _ = read(("user", "a"), ("assistant", content), ("user", "b"))
    assert turns == [Turn("user", "a"), Turn("assistant", ""), Turn("user", "b")]


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_show_images(role):
    before = [] if role == "system" else [("user", "what?")]
    error = refused(*before, (role, [image_part(data_uri(encoded())), text("x")]), ("user", "what?"))
    assert "only user messages" in str(error)


def damaged():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()[:2000]


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://example.com/a.png", "remote_image"),
        ("file:///etc/passwd", "remote_image"),
        ("", "remote_image"),
        ("data:image/png;base64", "invalid_data_uri"),
        ("data:image/png,abc", "invalid_data_uri"),
        ("data:text/html;base64,AAAA", "invalid_data_uri"),
        ("data:image/png;base64,@@@@", "invalid_base64"),
        ("data:image/png;base64,AAA", "invalid_base64"),
        ("data:image/png;base64,ÄÖ", "invalid_base64"),
        ("data:image/png;base64,", "image_unreadable"),
        (data_uri(b"no image at all"), "image_unreadable"),
        (data_uri(encoded()[:40]), "image_unreadable"),
        (data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "image_format"),
        (data_uri(damaged()), "image_truncated"),
    ],
)
def test_an_image_that_cannot_be_used(url, code):
    error = refused(("user", [text("what?"), image_part(url)]))
    assert (error.code, error.param) == (code, "messages[0].content[1].image_url.url")


def test_image_limits():
    url = data_uri(encoded(size=(40, 40)))
    asked = ("user", [text("what?"), image_part(url)])
    assert refused(asked, limits=Limits(image_pixels=1599)).code == "image_bomb"
    assert refused(asked, limits=Limits(image_bytes=50)).code == "image_too_large"
    assert refused(("user", [text("what?"), *[image_part(url)] * 5])).code == "too_many_images"
    assert len(read(asked, limits=Limits(image_pixels=1600, image_bytes=2000))[1]) == 1


def test_a_bomb_is_refused_before_it_is_decoded():
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    assert refused(("user", [text("what?"), image_part(data_uri(bomb))])).code == "image_bomb"


def test_base64_with_line_breaks():
    lines = "\n".join(textwrap.wrap(base64.b64encode(encoded()).decode(), 20))
    assert len(read(("user", [text("what?"), image_part(f"data:image/png;base64,{lines}")]))[1]) == 1


def drawing(mode: str) -> Image.Image:
    """A black square on a transparent ground, in any mode with alpha."""
    made = Image.new("RGBA", (20, 20))
    made.paste((0, 0, 0, 255), (5, 5, 12, 12))
    return made.convert(mode)


def file_of(made: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    made.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        encoded(kind="PNG"),
        encoded(kind="JPEG"),
        file_of(image(1), "MPO", save_all=True, append_images=[image(2)]),
        encoded(kind="WEBP"),
        encoded(kind="GIF"),
        encoded(kind="BMP"),
        file_of(drawing("RGBA"), "PNG"),
        file_of(drawing("LA"), "PNG"),
        file_of(drawing("RGBA"), "WEBP", lossless=True),
        file_of(Image.fromarray(np.linspace(0, 4095, 400, dtype=np.uint16).reshape(20, 20)), "PNG"),
    ],
    ids=["png", "jpeg", "mpo", "webp", "gif", "bmp", "rgba", "la", "webp with alpha", "12 bits"],
)
def test_everyone_sees_the_same_pixels(data, tmp_path):
    """What preparation accepts, serving, chat and the processor show the model as training does."""
    assert check_image(data) is None
    trained_on = load_pixels(data, 16)
    _, (served,) = read(("user", [text("what?"), image_part(data_uri(data))]))
    (tmp_path / "image").write_bytes(data)
    seen = {
        "serving": to_pixels(served, 16),
        "chat": to_pixels(next(iter(chat._Shown(str(tmp_path / "image")))), 16),
        "a path": to_pixels(as_image(tmp_path / "image"), 16),
        "base64": to_pixels(as_image(base64.b64encode(data).decode()), 16),
        "Pillow": to_pixels(as_image(Image.open(io.BytesIO(data))), 16),
        "chat, through the processor": to_pixels(as_image(next(iter(chat._Shown(str(tmp_path / "image"))))), 16),
    }
    assert [name for name, pixels in seen.items() if not np.array_equal(pixels, trained_on)] == []


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (encoded(kind="TIFF"), "image_format"),
        (encoded(size=(410, 10)), "image_aspect"),
        (b"version https://git-lfs.github.com/spec/v1\n", "image_unreadable"),
        (b"<html>Sign in</html>", "image_unreadable"),
    ],
)
def test_what_preparation_sets_aside_serving_refuses_for_the_same_reason(data, code):
    error = refused(("user", [text("what?"), image_part(data_uri(data))]))
    assert error.code == check_image(data).reason == code
    assert str(error).endswith(check_image(data).detail)


def test_one_large_image_is_decoded_at_a_time_and_an_error_lets_the_next_one_in(monkeypatch):
    monkeypatch.setattr(messages, "_LARGE_PIXELS", 10)
    large, damaged = data_uri(encoded()), data_uri(encoded()[:-40])
    _, first = read_lazily(("user", [text("what?"), image_part(large)]))
    next(first)
    assert messages._one_large_image.locked()  # until it has been resized and the next is asked for
    assert next(first, None) is None
    assert not messages._one_large_image.locked()
    _, second = read_lazily(("user", [text("what?"), image_part(damaged)]))
    with pytest.raises(ApiError):
        next(second)
    _, third = read_lazily(("user", [text("what?"), image_part(large)]))
    next(third)
    del third  # whoever resized it has failed
    assert not messages._one_large_image.locked()
