"""How images of any size are cut, and how many tokens each becomes: arithmetic, and the pixels that it asks for."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from mlmamba.configuration import VisionConfig
from mlmamba.image_layout import ImageLayout, join
from mlmamba.images import to_pixels
from tests.helpers.images import encoded, image

NATIVE = ImageLayout(patch=16, merge=2, min_tokens=16, max_tokens=256)
TILED = ImageLayout(9, 96, tiles=6)


@pytest.mark.parametrize("layout", [NATIVE, ImageLayout(patch=14, pool=2, min_tokens=4, max_tokens=40), TILED])
def test_counts_stay_within_their_bounds_and_a_turned_image_has_as_many(layout):
    draw = random.Random(0)
    for _ in range(2000):
        height, width = (round(2 ** draw.uniform(0, 12)) for _ in range(2))
        count, grid = layout.count(height, width), layout.grid(height, width)
        assert layout.fewest <= count <= layout.most, (height, width)
        assert layout.count(width, height) == count
        assert layout.grid(width, height) == grid[::-1] or height == width
        assert all(side % (layout.merge * layout.pool) == 0 for side in grid)


def test_an_image_has_a_token_for_each_square_of_its_own_pixels():
    assert NATIVE.grid(320, 480) == (20, 30)
    assert NATIVE.count(320, 480) == 150
    assert NATIVE.count(64, 64) == 16  # enlarged
    height, width = NATIVE.grid(3000, 4000)
    assert NATIVE.count(3000, 4000) == height * width // 4 == 14 * 18
    assert abs(height / width - 3 / 4) < 0.03  # aspect kept
    assert NATIVE.grid(10, 20_000) == (2, 512)


def test_tiles_are_those_that_show_most_of_the_image():
    assert TILED.grid(96, 96) == (1, 1)
    assert TILED.grid(50, 60) == (1, 1)
    assert TILED.count(96, 96) == 9
    assert TILED.grid(180, 280) == (2, 3)
    assert TILED.count(180, 280) == 9 * 7
    assert TILED.grid(2000, 300) == (6, 1)


@pytest.mark.parametrize("given", [729, NATIVE.per_image, TILED.per_image, {"patch": 16, "pool": 2, "max_tokens": 9}])
def test_what_data_sets_keep_says_all_that_counts(given):
    layout = ImageLayout.of(given, 384)
    assert ImageLayout.of(layout.per_image, 384) == layout
    assert layout.per_image == given or "min_tokens" not in given
    assert str(layout)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "tokens of an image is 0; expected a whole number of at least 1"),
        (True, "tokens of an image is True"),
        ({"patch": 16, "merge": 2, "min_tokens": 9, "max_tokens": 8}, "at least 9 tokens .min_tokens. and at most 8"),
        ({"patch": 16, "merge": 0, "min_tokens": 1, "max_tokens": 8}, "merge of an image is 0"),
        ({"patch": 16, "merge": 2, "least": 1, "max_tokens": 8}, "has no 'least': give a number; or patch, merge"),
        ({"tiles": 4}, "is not said by tiles: give a number"),
        ({}, "is not said by nothing"),
    ],
)
def test_what_says_nothing_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ImageLayout.of(given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": 4}, "min_tokens is 4 without max_tokens"),
        ({"tiles": 2, "max_tokens": 4}, "either tiled or read at its own size"),
        ({"grid": 2, "max_tokens": 4}, "each image has a grid of its own"),
        ({"min_tokens": 5, "max_tokens": 4}, "at least 5 tokens"),
        ({"max_tokens": 0}, "max_tokens of an image is 0"),
    ],
)
def test_a_vision_config_says_one_way(fields, message):
    with pytest.raises(ValueError, match=message):
        VisionConfig(**fields)


def test_the_square_is_the_square_of_ever():
    shown, layout = image(1, (50, 70)), ImageLayout(4, 32)
    cut = layout.cut(shown)
    assert (cut.grid, cut.tokens) == ((1, 1), 4)
    assert np.array_equal(cut.pixels, to_pixels(shown, 32)[None])
    assert layout.batch([])["pixel_values"].shape == (0, 3, 32, 32)
    assert VisionConfig(image_size=32).to_dict().keys().isdisjoint({"merge", "tiles", "min_tokens", "max_tokens"})


def test_patches_are_those_of_timm():
    from timm.data.naflex_transforms import patchify_image

    shown, layout = image(2, (64, 96), (5, 4)), ImageLayout(patch=16, merge=2, min_tokens=1, max_tokens=64)
    cut = layout.cut(shown)
    assert (cut.grid, cut.tokens) == ((6, 4), 6)
    patches, *_ = patchify_image(torch.from_numpy(np.array(shown)).permute(2, 0, 1), (16, 16))
    assert np.array_equal(patches.numpy(), cut.pixels)
    assert np.array_equal(np.array(layout.picture(cut)), np.array(shown))


def test_tiles_keep_the_aspect_beside_the_whole():
    shown, layout = image(3, (280, 180), (3, 3)), ImageLayout(9, 96, tiles=6)
    cut = layout.cut(shown)
    assert (cut.grid, cut.tokens, cut.pixels.shape, cut.squares) == ((2, 3), 63, (7, 3, 96, 96), 7)
    assert np.array_equal(cut.pixels[0], to_pixels(shown, 96))
    whole = np.array(layout.picture(cut))
    assert whole.shape == (192, 288, 3)
    black = (whole == 0).all(-1).all(1)  # rows above and below the image
    assert [int(black[:96].sum()), int(black[96:].sum())] == [3, 4]
    assert np.array_equal(whole[3:188], to_pixels(shown, (185, 288)).transpose(1, 2, 0))


def test_images_of_different_sizes_stand_in_one_batch():
    cuts = [NATIVE.cut(image(i, size)) for i, size in enumerate([(200, 100), (640, 480)])]
    batch = join(cuts)
    assert batch["spatial_shapes"].tolist() == [list(cut.grid) for cut in cuts]
    assert NATIVE.counts(**batch) == [cut.tokens for cut in cuts]
    assert batch["pixel_values"].shape == (sum(len(cut.pixels) for cut in cuts), 768)
    assert NATIVE.batch([])["spatial_shapes"].shape == (0, 2)
    loaded = NATIVE.load(encoded(0, size=(200, 100)))
    assert np.array_equal(loaded.pixels, cuts[0].pixels)


def test_a_part_of_an_image_can_take_its_place():
    shown = image(0, (640, 320), (4, 4))
    part = shown.crop((0, 0, 500, 320))
    assert NATIVE.cut(part, grid=NATIVE.grid(320, 640)).tokens == NATIVE.count(320, 640)
    assert isinstance(NATIVE.picture(NATIVE.cut(part)), Image.Image)
