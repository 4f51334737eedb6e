"""The image half of the processor as transformers knows it, for tools that ask a processor for it."""

from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin

from mlmamba.image_layout import CutImage, ImageLayout, TokensPerImage
from mlmamba.images import as_image


class MLMambaImageProcessor(ImageProcessingMixin):
    """Images, as `mlmamba.images.as_image` takes them, to uint8 (n, 3, s, s), or to what their layout asks for.

    Normalisation is part of the model, because encoders of different families share one batch.

    Args:
        image_size: side s in pixels.
        tokens_per_image: as `ImageLayout.of` takes it.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - the form that transformers reads

    def __init__(self, image_size: int = 384, tokens_per_image: TokensPerImage = 1, **kwargs):
        super().__init__(**kwargs)
        self.image_size, self.tokens_per_image = image_size, tokens_per_image

    def cut(self, images) -> list[CutImage]:
        """One image or a list, each as the encoder reads it. Raises ImageError where one cannot be used."""
        stacked = hasattr(images, "__array__") and getattr(images, "ndim", 0) == 4  # (n, h, w, 3) or (n, 3, h, w)
        images = list(images) if stacked or isinstance(images, (list, tuple)) else [images]
        layout = ImageLayout.of(self.tokens_per_image, self.image_size)
        return [layout.cut(as_image(image)) for image in images]

    def __call__(self, images, return_tensors: str = "pt") -> BatchFeature:
        """`pixel_values` of one image or a list, and their `spatial_shapes` where they are read at their own size.
        Raises ImageError where one cannot be used."""
        return BatchFeature(ImageLayout.of(self.tokens_per_image, self.image_size).batch(self.cut(images)))
