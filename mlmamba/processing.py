"""MLMambaProcessor: chats and images to model inputs."""

from collections.abc import Sequence

import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from mlmamba.chat_template import template_of
from mlmamba.conversation import IMAGE_TOKEN, Turn, check_turns, format_of, render
from mlmamba.image_layout import CutImage, ImageLayout, TokensPerImage
from mlmamba.image_processing import MLMambaImageProcessor
from mlmamba.images import as_image

_NAMED = 8  # images in an error
Sizes = Sequence[tuple[int, int]]
"""Width and height in pixels of images, in reading order over all prompts."""


class PromptTooLong(ValueError):
    """A prompt is longer than it may be, with its images' placeholders.

    Args:
        length: its tokens.
        limit: as many as it may have.
        images: tokens of each of its images.
        sizes: width and height of each, where these decide its tokens.
    """

    def __init__(self, length: int, limit: int, images: Sequence[int] = (), sizes: Sequence[tuple[int, int]] = ()):
        told, advice = "", "shorten it"
        if images:
            each = [f"{w} x {h} takes {n}" for (w, h), n in zip(sizes, images, strict=False)]
            named = f" ({', '.join(each[:_NAMED])}{', ...' if len(each) > _NAMED else ''})" if each else ""
            told = f", of which its {'image takes' if len(images) == 1 else f'{len(images)} images take'} {sum(images)}"
            told, advice = told + named, f"send fewer {'or smaller ' if each else ''}images, or a shorter text"
        super().__init__(f"a prompt is {length} tokens long{told}, over the limit of {limit}; {advice}")


class MLMambaProcessor(ProcessorMixin):
    """Turns chats with images into `input_ids`, `attention_mask` and `pixel_values`.

    A chat in transformers' form goes through `apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
    return_dict=True)`, which renders the prompt format of mlmamba/conversation.py and loads the images.

    Args:
        tokenizer: a tokenizer with an id for `<image>`.
        image_size: side in pixels of the encoder's input.
        tokens_per_image: placeholders that one image takes; or what decides them, as `ImageLayout.of` takes it.
        max_length: longest prompt in tokens; longer ones are an error, never cut.
        chat_template: Jinja template of a chat; that of the tokenizer's format (mlmamba/chat_template.py) by default.

    Raises:
        ValueError: the tokenizer has no `<image>`, or is for a chat format that is not known, or `tokens_per_image`
            stands for nothing.
    """

    def __init__(
        self,
        tokenizer=None,
        image_size: int = 384,
        tokens_per_image: TokensPerImage = 729,
        max_length: int = 2777,
        chat_template: str | None = None,
    ):
        self.image_size, self.tokens_per_image, self.max_length = image_size, tokens_per_image, max_length
        self.image_token, self.image_token_id = IMAGE_TOKEN, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no id for {IMAGE_TOKEN}; add it as a special token")
        ImageLayout.of(tokens_per_image, image_size)  # raises
        super().__init__(tokenizer, chat_template=chat_template or template_of(format_of(tokenizer)))

    @property
    def layout(self) -> ImageLayout:
        """How images are cut, and how many placeholders each takes."""
        return ImageLayout.of(self.tokens_per_image, self.image_size)

    @property
    def image_processor(self) -> MLMambaImageProcessor:
        """The image half; batches of transformers' pipelines need to know it."""
        return MLMambaImageProcessor(self.image_size, self.tokens_per_image)

    @property
    def model_input_names(self) -> list[str]:
        own = ["spatial_shapes"] if self.layout.patch else []
        return ["input_ids", "attention_mask", "pixel_values", *own]

    def prompt(self, turns: list[Turn]) -> str:
        """The prompt text for these turns, ready for the assistant's answer. Raises ValueError on bad turns."""
        check_turns(turns, asking=True)
        if turns[-1].role != "user":
            raise ValueError("the last turn is the assistant's; a prompt ends with a user turn")
        return render(turns, self.tokenizer.eos_token, chat=format_of(self.tokenizer))

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Tokenize prompts and stack images.

        Args:
            images: one image, a list in reading order over all prompts, or one list for each prompt. An image is
                whatever `mlmamba.images.as_image` takes; uint8 values (n, h, w, 3) or (n, 3, h, w) are a list of n.
            text: one prompt or a list, each `<image>` standing for one image; None for images alone.
            padding: True; False is an error where prompts differ in length.
            padding_side: "left" or "right"; the model honours the mask on either side, and `generate` both.
            return_tensors: "pt".
            kwargs: `return_offsets_mapping` and `return_text_replacement_offsets` as in transformers;
                `add_special_tokens` and `truncation` only as False.

        Returns:
            `input_ids` and `attention_mask` int64 (b, l), and, with images, `pixel_values` uint8 (n, 3, s, s), or as
            the layout asks for, with `spatial_shapes` where images are read at their own size.

        Raises:
            ValueError: placeholders and images differ in number, or a prompt is empty or over `max_length`.
            ImageError: an image cannot be used.
            TypeError: an option that there is not.
        """
        offsets = {
            name: kwargs.pop(name, False) for name in ("return_offsets_mapping", "return_text_replacement_offsets")
        }
        self._refuse_options(padding, padding_side, return_tensors, kwargs)
        groups, grouped = _group(images)
        flat = [image for group in groups for image in group]
        if text is None and not flat:
            raise ValueError("neither text nor images were given")
        batch = BatchFeature()
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            self._check_counts(texts, groups, grouped)
        layout, sizes = self.layout, [] if self.layout.fixed is None else None
        cut = [] if sizes is None else [_cut(layout, image, sizes) for image in flat]  # their sizes decide the text
        if text is not None:
            batch = self.tokenize(texts, padding_side, padding=bool(padding), image_sizes=sizes, **offsets)
        if flat:
            batch.update(layout.batch(cut or self.image_processor.cut(flat)))
        return batch

    def tokenize(
        self,
        texts: list[str],
        padding_side: str = "left",
        padding: bool = True,
        return_offsets_mapping: bool = False,
        return_text_replacement_offsets: bool = False,
        image_sizes: Sizes | None = None,
        max_length: int | None = None,
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` (b, l) of prompts, each `<image>` expanded to its run of placeholders.

        Args:
            image_sizes: of the images, which need not have been decoded; not needed where each has as many tokens.
            max_length: the longest prompt; the processor's own by default.

        Raises:
            ValueError: a prompt is empty, or there is none, or `image_sizes` is not of as many images.
            PromptTooLong: one is over the limit.
        """
        if not texts:
            raise ValueError("no prompt was given")
        counts = self._counts(texts, image_sizes)
        if sum(counts) > (max_length or self.max_length):
            self.check_lengths(texts, image_sizes, max_length)  # without writing all the placeholders
        runs = [IMAGE_TOKEN * tokens for tokens in counts]
        expanded = expand(texts, runs)
        encoded = self.tokenizer(expanded, add_special_tokens=False, return_offsets_mapping=return_offsets_mapping)
        ids = encoded["input_ids"]
        lengths = [len(row) for row in ids]
        longest = max(lengths)
        if not min(lengths):
            raise ValueError(f"prompt {lengths.index(0)} is empty")
        self._refuse_long(texts, lengths, counts, image_sizes, max_length)
        if not padding and min(lengths) != longest:
            raise ValueError(
                f"prompts of {min(lengths)} to {longest} tokens do not fit one tensor without padding=True"
            )
        # pad = eos for GPT-NeoX, so the mask comes from the lengths.
        left = padding_side == "left"
        fill = [longest - length for length in lengths]
        pad = self.tokenizer.pad_token_id
        batch = BatchFeature(
            {
                "input_ids": torch.tensor([_pad(row, n, pad, left) for row, n in zip(ids, fill, strict=True)]),
                "attention_mask": torch.tensor([_pad([1] * n, longest - n, 0, left) for n in lengths]),
            }
        )
        if return_offsets_mapping:
            spans = zip(encoded["offset_mapping"], fill, strict=True)
            batch["offset_mapping"] = [_pad(row, n, (0, 0), left) for row, n in spans]
        if return_text_replacement_offsets:
            batch["text_replacement_offsets"] = self.get_text_with_replacements(list(texts), runs)[1]
        return batch

    def lengths(self, texts: Sequence[str], image_sizes: Sizes | None = None) -> list[int]:
        """Tokens of prompts with their images' placeholders, as `tokenize` takes both, however many."""
        left = iter(self._counts(texts, image_sizes))
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [
            len(row) + sum(next(left) - 1 for _ in range(text.count(IMAGE_TOKEN)))
            for text, row in zip(texts, rows, strict=True)
        ]

    def check_lengths(
        self, texts: Sequence[str], image_sizes: Sizes | None = None, max_length: int | None = None
    ) -> None:
        """Raise PromptTooLong where `tokenize` would, from the sizes of images alone."""
        lengths, counts = self.lengths(texts, image_sizes), self._counts(texts, image_sizes)
        self._refuse_long(texts, lengths, counts, image_sizes, max_length)

    def _refuse_long(self, texts, lengths, counts, image_sizes, max_length) -> None:
        limit, first = max_length or self.max_length, 0
        shown = image_sizes if image_sizes and self.layout.fixed is None else ()
        for text, length in zip(texts, lengths, strict=True):
            own = slice(first, first + text.count(IMAGE_TOKEN))
            if length > limit:
                raise PromptTooLong(length, limit, counts[own], shown[own])
            first = own.stop

    def ids(self, texts: list[str], image_sizes: Sizes | None = None) -> list[list[int]]:
        """Token ids of prompts, however many; otherwise as `tokenize`."""
        expanded = expand(texts, [IMAGE_TOKEN * tokens for tokens in self._counts(texts, image_sizes)])
        return self.tokenizer(expanded, add_special_tokens=False)["input_ids"]

    def _counts(self, texts: Sequence[str], image_sizes: Sizes | None) -> list[int]:
        """Placeholders of each image of the prompts."""
        count, layout = sum(text.count(IMAGE_TOKEN) for text in texts), self.layout
        if image_sizes is None and (layout.fixed is not None or not count):
            return [layout.most] * count
        if image_sizes is None or len(image_sizes) != count:
            given = "none" if image_sizes is None else len(image_sizes)
            raise ValueError(f"the prompts show {count} images, and the sizes of {given} were given")
        return [layout.count(height, width) for width, height in image_sizes]

    def _refuse_options(self, padding, padding_side, return_tensors, others: dict) -> None:
        if padding not in (True, False, None, "longest"):
            raise ValueError(f"padding is {padding!r}; expected True or False: prompts are padded to the longest")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; expected 'left' or 'right'")
        if str(getattr(return_tensors, "value", return_tensors)) != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; the processor gives torch tensors, 'pt'")
        if others.get("truncation"):
            raise ValueError(f"truncation={others['truncation']!r}: prompts are never cut; shorten the text")
        known = {"truncation", "add_special_tokens"}
        if unknown := sorted(name for name, value in others.items() if value is not None and name not in known):
            what = f"MLMambaProcessor has no option {', '.join(unknown)}"
            raise TypeError(f"{what}; those of `generate` go to it, by a pipeline's generate_kwargs")

    def _check_counts(self, texts: list[str], groups: list[list], grouped: bool) -> None:
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"text is a list of {type(texts[0]).__name__}; expected a prompt or a list of prompts")
        counts = [text.count(IMAGE_TOKEN) for text in texts]
        if grouped and groups:
            if len(groups) != len(texts):
                raise ValueError(f"{len(texts)} prompts but {len(groups)} lists of images were given")
            for row, (count, group) in enumerate(zip(counts, groups, strict=True)):
                if count != len(group):
                    raise ValueError(f"prompt {row} has {count} {IMAGE_TOKEN} but {len(group)} images were given")
        given = sum(map(len, groups))
        if sum(counts) != given:
            raise ValueError(f"the prompts have {sum(counts)} {IMAGE_TOKEN} but {given} images were given")


def expand(texts: Sequence[str], runs: Sequence[str]) -> list[str]:
    """Texts with each `<image>` replaced by the next of the runs."""
    left = iter(runs)
    pieces = [text.split(IMAGE_TOKEN) for text in texts]
    return [first + "".join(next(left) + piece for piece in rest) for first, *rest in pieces]


def _group(images) -> tuple[list[list], bool]:
    """Images as lists, and whether they came as one list for each prompt."""
    if images is None:
        return [], False
    images = _unstacked(images)
    if isinstance(images, (list, tuple)):
        images = [_unstacked(image) for image in images]
    if not isinstance(images, (list, tuple)):
        return [[images]], False
    if images and all(isinstance(group, (list, tuple)) for group in images):
        return [list(group) for group in images], True
    return [list(images)], False


def _cut(layout: ImageLayout, image, sizes: list[tuple[int, int]]) -> CutImage:
    """An image as the encoder reads it, and its size added to those before. Raises ImageError."""
    whole = as_image(image)
    sizes.append(whole.size)
    return layout.cut(whole)


def _unstacked(images):
    """The images of an array or tensor (n, h, w, 3) or (n, 3, h, w) as a list; anything else as it is."""
    return list(images) if hasattr(images, "__array__") and getattr(images, "ndim", 0) == 4 else images


def _pad(row: list, count: int, value, left: bool) -> list:
    return [value] * count + row if left else row + [value] * count
