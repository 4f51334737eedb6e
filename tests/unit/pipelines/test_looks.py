"""What an image looks like: the same through ten disguises, another one for another image, none without contrast."""

import numpy as np
import pytest
from PIL import Image

from mlmamba.images import open_image
from pipelines.looks import LOOK_BYTES, WINDOWS, Wanted, all_fields, fields, keys
from tests.benchmarks.studies.near_duplicates import DISGUISES, jpeg
from tests.helpers.images import scene

LEAST = 0.8


def look(image: Image.Image) -> bytes:
    return keys([fields(image)])[0]


def looks(image: Image.Image) -> bytes:
    return keys([all_fields(image)])[0]


def reduced(data: bytes) -> Image.Image:
    return open_image(data, reduced=True)


@pytest.fixture(scope="module")
def wanted():
    return Wanted([looks(reduced(jpeg(scene(seed)))) for seed in range(20)])


@pytest.mark.parametrize("name", DISGUISES)
def test_each_disguise_is_found_with_its_twin(wanted, name):
    asked = [look(reduced(DISGUISES[name](scene(seed)))) for seed in range(20)]
    assert [(place, twin) for place, twin, _ in wanted.find(asked, LEAST)] == [(i, i) for i in range(20)]


def test_other_images_are_not_found(wanted):
    asked = [look(reduced(jpeg(scene(seed)))) for seed in range(100, 300)]
    assert wanted.find(asked, LEAST) == []
    assert len(wanted.find(asked, -1)) == 200


def test_an_image_without_contrast_has_no_key_and_finds_nothing(wanted):
    for colour in ("white", "black", "grey"):
        plain = Image.new("RGB", (60, 40), colour)
        assert look(plain) == looks(plain) == b""
    key = look(scene(3))
    assert [place for place, _, _ in wanted.find([b"", key, b""], LEAST)] == [1]
    assert Wanted([]).find([key], 0) == Wanted([b""]).find([key], 0) == []


def test_keys_of_any_size_and_mode():
    for size in ((1, 1), (1, 300), (7, 5), (2000, 30)):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
        assert len(look(noise)) in (0, LOOK_BYTES)
        assert len(looks(noise)) % LOOK_BYTES == 0
    image = scene(0)
    assert len(looks(image)) == len(WINDOWS) * LOOK_BYTES
    assert look(image) == look(image.convert("L")) == looks(image)[:LOOK_BYTES]


def test_keys_of_many_at_once_are_those_of_each():
    images = [scene(seed) for seed in range(70)]
    images[3] = Image.new("RGB", (50, 50))
    assert keys([fields(image) for image in images]) == [look(image) for image in images]
    assert keys([all_fields(images[3]), all_fields(images[0])]) == [b"", looks(images[0])]
    assert keys([]) == []
