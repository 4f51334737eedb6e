"""MLMambaProcessor: chats and pictures to model inputs."""

import numpy as np
import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from mlmamba.conversation import IMAGE_TOKEN, Turn, check_turns, render
from mlmamba.pictures import to_pixels


class MLMambaProcessor(ProcessorMixin):
    """Turns chats with pictures into `input_ids`, `attention_mask` and `pixel_values`.

    Args:
        tokenizer: a tokenizer with an id for `<image>`.
        image_size: side in pixels of the encoder's input.
        tokens_per_image: placeholders that one picture takes.
        max_length: longest prompt in tokens; longer ones are an error, never cut.

    Raises:
        ValueError: the tokenizer has no `<image>`.
    """

    attributes = ["tokenizer"]  # noqa: RUF012 - the form that transformers reads
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self, tokenizer=None, image_size: int = 384, tokens_per_image: int = 729, max_length: int = 2777, **kw
    ):
        self.image_size, self.tokens_per_image, self.max_length = image_size, tokens_per_image, max_length
        self.image_token, self.image_token_id = IMAGE_TOKEN, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no id for {IMAGE_TOKEN}; add it as a special token")
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
        batch = self.tokenize(texts, padding_side)
        if images:
            batch["pixel_values"] = torch.from_numpy(np.stack([to_pixels(p, self.image_size) for p in images]))
        return batch

    def tokenize(self, texts: list[str], padding_side: str = "left") -> BatchFeature:
        """`input_ids` and `attention_mask` (b, l) of prompts, each `<image>` expanded to its run of placeholders.

        Raises:
            ValueError: a prompt is over `max_length`.
        """
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
        return BatchFeature({"input_ids": batch["input_ids"], "attention_mask": mask.long()})
