"""Keys, tags and files that name images or video and are not read: which count, and which are no more than remarks."""

import pytest

from mlmamba.conversation import Turn
from pipelines.sources.unread import unread_file, unread_key, unread_tag


@pytest.mark.parametrize(
    "key", ["image_path", "imgs", "img", "picture", "imagePath", "frames", "image_url", "photo_id"]
)
def test_a_key_that_names_images_counts_where_none_was_read(key):
    entry = {"id": "a", key: "1.png", "conversations": []}
    assert f"has {key}, which names an image" in unread_key(entry, ("image", "images"), 0)
    assert unread_key(entry, ("image", "images"), 1) is None
    assert unread_key(entry | {key: None}, (), 0) is not None
    assert unread_key(entry | {key: []}, (), 0) is None


@pytest.mark.parametrize("key", ["video", "videos", "video_path", "audio", "audios"])
def test_a_key_that_names_video_or_sound_counts_always(key):
    for images in (0, 1):
        assert f"has {key}, which names video or sound" in unread_key({key: ["a.mp4"]}, (), images)
        assert unread_key({key: None}, (), images) is unread_key({key: []}, (), images) is None


@pytest.mark.parametrize(
    "key", ["id", "model", "image_size", "imagination", "framework", "videogame", "height", "source"]
)
def test_other_keys_are_remarks(key):
    assert unread_key({key: "something"}, (), 0) is None


def test_what_is_read_and_what_only_counts():
    assert unread_key({"image": "1.png", "images": ["1.png"]}, ("image", "images"), 0) is None
    assert unread_key({"frames": 8, "photo": True}, (), 0) is None
    assert unread_key({"image_id": 8}, (), 0) is not None


@pytest.mark.parametrize(
    "text",
    [
        "<video>\nWhat happens?",
        "What happens?\n<video>",
        "Look:\n  <|image|>\nWhat?",
        "<image_1> What?",
        "<ImageHere>What?",
        "What is it? [IMG]",
        "<img>a.png</img> What?",
        "<|vision_start|><|image_pad|><|vision_end|>What?",
        "<audio>\nWho speaks?",
    ],
)
def test_tags_of_other_projects(text):
    assert "turn 2 has " in unread_tag([Turn("user", "Hi"), Turn("assistant", text), Turn("user", text)], 0)


@pytest.mark.parametrize(
    "text",
    [
        "How do I use <video> in HTML?",
        "<video>\n<source src='a.mp4'>\n</video>\nWhy does it not play?",
        '<img src="a.png">\nWhy is it not shown?',
        "<image>\nWhat?",
        "I < img > you",
    ],
)
def test_text_about_tags_is_text(text):
    assert unread_tag([Turn("user", text), Turn("assistant", "So.")], 0) is None


def test_tags_for_images_are_words_where_the_images_are_read():
    assert unread_tag([Turn("user", "<image_1> What?", 1)], 1) is None
    assert unread_tag([Turn("user", "<video>\nWhat?", 1)], 1) is not None


def test_files_of_a_sample():
    assert "video or sound" in unread_file("mp4")
    assert "a format that is not read" in unread_file("0.heic")
    assert unread_file("json") is unread_file("txt") is unread_file("cls") is None
