"""Random changes of training images: what they may do, and that a key always gives the same one."""

import numpy as np
import pytest
from PIL import Image

from mlmamba.image_layout import ImageLayout
from mlmamba.images import PIXELS, ImageError, load_pixels
from pipelines.augment import Augmentation, crop_box
from tests.helpers.images import encoded
from workflows.recipe.train import AugmentRecipe

DATA = encoded(3, size=(48, 32))


def changed(key=(1, 2, 3, 4), data=DATA, **options) -> np.ndarray:
    return Augmentation(**options).load(data, ImageLayout(image_size=16), PIXELS, key).pixels[0]


@pytest.mark.parametrize("options", [{"crop": 0.5}, {"flip": True}, {"colour": 0.4}, {"crop": 0.2, "colour": 0.9}])
def test_a_key_gives_the_same_change_and_keys_give_many(options):
    assert (changed(**options) == changed(**options)).all()
    seen = {changed((1, step, 0, 0), **options).tobytes() for step in range(40)}
    assert len(seen) == 2 if options == {"flip": True} else len(seen) > 30


def test_half_of_the_images_are_mirrored():
    plain = load_pixels(DATA, 16)
    flipped = [(changed((step,), flip=True) == plain[:, :, ::-1]).all() for step in range(400)]
    assert 150 < sum(flipped) < 250
    assert all((changed((step,), flip=True) == plain).all() for step, mirrored in enumerate(flipped) if not mirrored)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3, 2), (640, 480), (20, 1000)])
@pytest.mark.parametrize("least", [0.01, 0.3, 0.99])
def test_a_crop_lies_in_the_image_and_is_large_enough(size, least):
    draw = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = crop_box(size, least, draw)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        if min(size) > 100:
            assert (right - left) * (bottom - top) >= 0.74 * least * size[0] * size[1]  # a side is never over its whole
            assert 0.55 < ((right - left) / size[0]) / ((bottom - top) / size[1]) < 1.8


def test_light_changes_a_grey_image_within_its_bounds():
    grey = Image.new("RGB", (32, 32), (100, 100, 100))
    values = [changed((step,), _png(grey), colour=0.2).astype(int) for step in range(50)]
    assert all(78 <= v.min() <= v.max() <= 121 for v in values)
    assert len({v.tobytes() for v in values}) > 20


def test_what_cannot_be_read_is_refused_as_without():
    with pytest.raises(ImageError):
        changed(data=b"nothing", crop=0.5)


@pytest.mark.parametrize("wrong", [{}, {"crop": 1.0}, {"crop": 0}, {"crop": 1.5}, {"colour": 1.0}, {"flipp": True}])
def test_a_recipe_that_asks_for_nothing_or_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"augment changes nothing|crop|colour|flipp"):
        AugmentRecipe(**wrong)


def _png(image: Image.Image) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
