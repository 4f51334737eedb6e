"""Images changed at random while a model trains: cropped, mirrored, in other light. Each change is a function of a key.

Validation, evaluation and serving show images as they are.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from mlmamba.images import WIDEST, open_image, to_pixels

_ASPECT = 4 / 3  # at most, of a crop to the image's own


@dataclass(frozen=True)
class Augmentation:
    """What may be changed, and by how much; see AugmentRecipe in workflows/recipe/train.py."""

    crop: float = 1.0
    flip: bool = False
    colour: float = 0.0

    def load_pixels(self, data: bytes, size: int, pixels: int, key: tuple[int, ...]) -> np.ndarray:
        """As `mlmamba.images.load_pixels`, changed by draws that depend on `key` alone. Raises ImageError."""
        draw = np.random.default_rng(key)
        image = open_image(data, WIDEST, pixels)
        if self.crop < 1:
            image = image.crop(crop_box(image.size, self.crop, draw))
        if self.flip and draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = to_pixels(image, size, pixels)
        return self._in_other_light(values, draw) if self.colour else values

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
