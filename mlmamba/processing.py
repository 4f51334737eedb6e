"""MLMambaProcessor: pictures and text to model inputs, and the safe decoding of encoded pictures."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from mlmamba.conversation import IMAGE_TOKEN, Turn, check_turns, render

MAX_PIXELS = 64_000_000


class PictureError(ValueError):
    """A picture that cannot be used. `reason` is a short stable code, the message says the details."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an encoded picture fully, upright and in RGB.

    Raises:
        PictureError: `image_unreadable` (no picture format), `image_bomb` (more than max_pixels) or `image_truncated`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
    except Exception as error:
        raise PictureError("image_unreadable", f"not a picture that Pillow can read ({len(data)} bytes)") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise PictureError("image_bomb", f"{width}x{height} pixels, over the limit of {max_pixels}")
    try:
        picture.load()
        return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:
        raise PictureError("image_truncated", f"the picture data is damaged: {error}") from error


def to_pixels(picture: Image.Image, size: int) -> np.ndarray:
    """RGB picture -> uint8 (3, size, size), resized directly (aspect ignored), as the released ML-Mamba does."""
    resized = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1))


def load_pixels(data: bytes, size: int) -> np.ndarray:
    """Encoded picture -> uint8 (3, size, size). Raises PictureError."""
    return to_pixels(open_picture(data), size)


class MLMambaProcessor(ProcessorMixin):
    """Turns chats with pictures into `input_ids`, `attention_mask` and `pixel_values`.

    Args:
        tokenizer: a tokenizer with an id for `<image>`.
        image_size: side in pixels of the encoder's input.
        tokens_per_image: placeholders that one picture takes.
        max_length: longest prompt in tokens; longer ones are an error, never cut.
    """

    attributes = ["tokenizer"]  # noqa: RUF012 - the form that transformers reads
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self, tokenizer=None, image_size: int = 384, tokens_per_image: int = 729, max_length: int = 2777, **kw
    ):
        self.image_size, self.tokens_per_image, self.max_length = image_size, tokens_per_image, max_length
        self.image_token, self.image_token_id = IMAGE_TOKEN, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(tokenizer)

    def prompt(self, turns: list[Turn]) -> str:
        """The prompt text for these turns, ready for the assistant's answer. Raises ValueError on bad turns."""
        check_turns(turns)
        if turns[-1].role != "user":
            raise ValueError("the last turn is the assistant's; a prompt ends with a user turn")
        return render(turns, self.tokenizer.eos_token)

    def __call__(self, images=None, text=None, padding_side: str = "left", **kwargs) -> BatchFeature:
        """Tokenize prompts and stack pictures.

        Args:
            images: PIL pictures in reading order over all prompts, or None.
            text: one prompt or a list, each `<image>` standing for one picture.
            padding_side: "left" for generation; the model honours the mask on either side.

        Raises:
            ValueError: placeholders and pictures differ in number, or a prompt is over `max_length`.
        """
        texts = [text] if isinstance(text, str) else list(text)
        images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        placeholders = sum(t.count(IMAGE_TOKEN) for t in texts)
        if placeholders != len(images):
            raise ValueError(f"the prompts have {placeholders} {IMAGE_TOKEN} but {len(images)} pictures were given")
        expanded = [t.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.tokens_per_image) for t in texts]
        ids = self.tokenizer(expanded, add_special_tokens=False)["input_ids"]
        longest = max(map(len, ids))
        if longest > self.max_length:
            raise ValueError(f"a prompt is {longest} tokens long, over the limit of {self.max_length}; shorten it")
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side=padding_side, return_tensors="pt")
        # pad = eos for GPT-NeoX, so the mask comes from the lengths.
        lengths = torch.tensor([len(row) for row in ids])[:, None]
        positions = torch.arange(longest)[None]
        mask = positions >= longest - lengths if padding_side == "left" else positions < lengths
        data = {"input_ids": batch["input_ids"], "attention_mask": mask.long()}
        if images:
            data["pixel_values"] = torch.from_numpy(np.stack([to_pixels(p, self.image_size) for p in images]))
        return BatchFeature(data)
