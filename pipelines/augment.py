"""Images changed at random while a model trains: cropped, mirrored, in other light. Each change is a function of a key.

Validation, evaluation and serving show images as they are.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from mlmamba.image_layout import CutImage, ImageLayout
from mlmamba.images import WIDEST, open_image

_ASPECT = 4 / 3  # at most, of a crop to the image's own


@dataclass(frozen=True)
class Augmentation:
    """What may be changed, and by how much; see AugmentRecipe in workflows/recipe/train.py."""

    crop: float = 1.0
    flip: bool = False
    colour: float = 0.0

    def load(self, data: bytes, layout: ImageLayout, pixels: int, key: tuple[int, ...]) -> CutImage:
        """As `ImageLayout.load`, changed by draws that depend on `key` alone. It takes as many tokens as the whole
        image. Raises ImageError."""
        draw = np.random.default_rng(key)
        image = open_image(data, WIDEST, pixels)
        grid = layout.grid(image.height, image.width)
        if self.crop < 1:
            image = image.crop(crop_box(image.size, self.crop, draw))
        if self.flip and draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.colour and layout.fixed is None:  # what is in pieces later has one contrast
            values = self._in_other_light(np.array(image).transpose(2, 0, 1), draw)
            return layout.cut(Image.fromarray(values.transpose(1, 2, 0)), pixels, grid)
        cut = layout.cut(image, pixels, grid)
        return replace(cut, pixels=self._in_other_light(cut.pixels[0], draw)[None]) if self.colour else cut

    def _in_other_light(self, values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        shown = torch.from_numpy(values)
        for change in (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation):
            shown = change(shown, draw.uniform(1 - self.colour, 1 + self.colour))
        return shown.numpy()


def crop_box(size: tuple[int, int], least: float, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a part of an image with a share of its area in [least, 1], anywhere in it.

    As Inception's crop (Szegedy et al. 2015), but of the image's own aspect, up to 4/3 of it either way.
    """
    share, aspect = draw.uniform(least, 1), np.exp(draw.uniform(-np.log(_ASPECT), np.log(_ASPECT)))
    across, down = min(1.0, np.sqrt(share * aspect)), min(1.0, np.sqrt(share / aspect))
    width, height = (max(1, round(side * part)) for side, part in zip(size, (across, down), strict=True))
    left, top = (int(draw.integers(0, whole - part + 1)) for whole, part in zip(size, (width, height), strict=True))
    return left, top, left + width, top + height
