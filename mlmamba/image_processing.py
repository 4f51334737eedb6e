"""The image half of the processor as transformers knows it, for tools that ask a processor for it."""

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin

from mlmamba.images import as_image, to_pixels


class MLMambaImageProcessor(ImageProcessingMixin):
    """Images, as `mlmamba.images.as_image` takes them, to uint8 (n, 3, s, s).

    Normalisation is part of the model, because encoders of different families share one batch.

    Args:
        image_size: side s in pixels.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - the form that transformers reads

    def __init__(self, image_size: int = 384, **kwargs):
        super().__init__(**kwargs)
        self.image_size = image_size

    def __call__(self, images, return_tensors: str = "pt") -> BatchFeature:
        """`pixel_values` of one image or a list. Raises ImageError where one cannot be used."""
        stacked = hasattr(images, "__array__") and getattr(images, "ndim", 0) == 4  # (n, h, w, 3) or (n, 3, h, w)
        images = list(images) if stacked or isinstance(images, (list, tuple)) else [images]
        pixels = np.stack([to_pixels(as_image(image), self.image_size) for image in images])
        return BatchFeature({"pixel_values": torch.from_numpy(pixels)})
