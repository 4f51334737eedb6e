"""A model that answers batches of questions about images: each image is read once for all its questions."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mlmamba.conversation import IMAGE_TOKEN, Turn
from mlmamba.decoding import prepare
from mlmamba.image_layout import CutImage
from mlmamba.images import WIDEST, image_size
from mlmamba.loading import load_model
from mlmamba.processing import PromptTooLong
from mlmamba.state import MambaState


@dataclass(frozen=True)
class Asked:
    """One image's encoded bytes (None for text only) and its questions."""

    image: bytes | None
    questions: list[str]


@dataclass(frozen=True)
class Reply:
    """An answer and what it took."""

    text: str
    p_first: float | None
    """Probability of the first of two choices against the second, as first token; None where none were given."""
    prompt_tokens: int
    answer_tokens: int
    """Generated tokens, the end token included."""
    cut: bool
    """The longest length came before the end token."""
    seconds: float
    """The answer's share of its batch's time."""


class Answerer:
    """Greedy answers of one model.

    Args:
        model: model folder.
        max_new_tokens: longest answer.
        threads: torch threads; None leaves them.
        choices: two answers whose probability as first token is wanted.
        batch_questions: most questions in one forward pass; None for all of a call.
        precision, exact: as `load_model` takes them; `model.prepared` says what became of them.

    Raises:
        ValueError: the two choices begin with the same token, so their first tokens cannot tell them apart.
    """

    def __init__(
        self,
        model: str | Path,
        max_new_tokens: int,
        threads: int | None = None,
        choices: tuple[str, str] | None = None,
        batch_questions: int | None = None,
        precision: str = "auto",
        exact: bool = False,
    ):
        if threads:
            torch.set_num_threads(threads)
        self.model, self.processor = load_model(model, precision=precision, exact=exact)
        prepare(self.model)
        self.max_new_tokens, self.batch_questions = max_new_tokens, batch_questions
        self._choices = None if choices is None else first_tokens(self.processor.tokenizer, choices)

    def answer(self, asked: list[Asked]) -> list[list[str]]:
        """Answers to all questions, in the order given; each question is asked alone, without the others."""
        return [[reply.text for reply in replies] for replies in self.reply(asked)]

    @torch.inference_mode()
    def reply(self, asked: list[Asked]) -> list[list[Reply]]:
        """The same, with what the answers took.

        Raises:
            ImageError: an image cannot be used.
            ValueError: a question is empty.
            PromptTooLong: a question and its image are too long for a prompt; then no image has been decoded.
        """
        start = time.perf_counter()
        for item in asked:
            self._check_lengths(item)
        shown = [self.processor.layout.load(item.image) for item in asked if item.image is not None]
        read = self._read_images(shown)
        reading = (time.perf_counter() - start) / max(sum(len(item.questions) for item in asked), 1)
        rows, images = [], 0
        for item in asked:
            owner = None if item.image is None else images
            images += item.image is not None
            rows += [(question, owner) for question in item.questions]
        replies: list[Reply | None] = [None] * len(rows)
        for group in self._batches(rows):
            for index, reply in zip(group, self._generate([rows[i] for i in group], read, shown, reading), strict=True):
                replies[index] = reply
        in_order = iter(replies)
        return [[next(in_order) for _ in item.questions] for item in asked]

    def check(self, asked: Asked) -> None:
        """Look at an image and its questions without answering.

        Raises:
            ImageError: the image cannot be used.
            ValueError: a question is empty.
            PromptTooLong: a question and its image are too long for a prompt.
        """
        self._check_lengths(asked)
        if asked.image is not None:
            self.processor.layout.load(asked.image)

    def too_long(self, asked: Asked) -> dict[int, PromptTooLong]:
        """Questions that are too long for a prompt with the image, by number; of the image, the size is read alone.

        Raises:
            ImageError: its size cannot be read.
            ValueError: a question is empty.
        """
        found = {}
        size = None if asked.image is None else [image_size(asked.image, WIDEST)]
        for number, question in enumerate(asked.questions):
            prompt = self.processor.prompt([Turn("user", question)])
            if size is not None:
                prompt = IMAGE_TOKEN + prompt
            try:
                self.processor.check_lengths([prompt], size)
            except PromptTooLong as error:
                found[number] = error
        return found

    def _check_lengths(self, asked: Asked) -> None:
        for error in self.too_long(asked).values():
            raise error

    def _read_images(self, images: list[CutImage]) -> MambaState | None:
        """The state after each image, from which all its questions go on: a prompt begins with its image."""
        if not images:
            return None
        lengths = torch.tensor([image.tokens for image in images])
        seen = (torch.arange(int(lengths.max())).flip(0) < lengths[:, None]).to(self.model.device)
        image_id, pad = self.processor.image_token_id, self.processor.tokenizer.pad_token_id
        output = self.model(
            input_ids=torch.full(seen.shape, pad, device=seen.device).masked_fill(seen, image_id),
            attention_mask=seen.long(),
            use_cache=True,
            logits_to_keep=1,
            **{name: t.to(self.model.device) for name, t in self.processor.layout.batch(images).items()},
        )
        return output.cache_params

    def _batches(self, rows: list[tuple[str, int | None]]) -> Iterator[list[int]]:
        """Indices of rows to run together: with an image or without, at most `batch_questions`."""
        for with_image in (True, False):
            chosen = [i for i, (_, owner) in enumerate(rows) if (owner is not None) == with_image]
            size = self.batch_questions or max(len(chosen), 1)
            yield from (chosen[first : first + size] for first in range(0, len(chosen), size))

    def _generate(
        self, rows: list[tuple[str, int | None]], read: MambaState | None, images: list[CutImage], reading: float
    ) -> list[Reply]:
        """Replies to questions that all have an image, given by its index in `read`, or all have none."""
        start = time.perf_counter()
        owners = [owner for _, owner in rows if owner is not None]
        prompts = [self.processor.prompt([Turn("user", question)]) for question, _ in rows]
        inputs = self.processor.tokenize(prompts).to(self.model.device)
        state = read.select(torch.tensor(owners, device=self.model.device)) if owners else None
        first = _FirstLogits(self._choices)
        ids = self.model.generate(
            **inputs,
            **({} if state is None else {"cache_params": state}),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            use_cache=True,
            logits_processor=LogitsProcessorList([first]),
        )
        new = ids[:, inputs["input_ids"].shape[1] :].tolist()
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        chances = [None] * len(rows) if first.logits is None else first.logits.softmax(-1)[:, 0].tolist()
        shown = torch.tensor([0 if owner is None else images[owner].tokens for _, owner in rows])
        lengths = (inputs["attention_mask"].sum(1).cpu() + shown).tolist()
        seconds = reading + (time.perf_counter() - start) / len(rows)
        end = self.processor.tokenizer.eos_token_id
        return [
            Reply(text.strip(), chance, length, *answer_length(tokens, end), seconds)
            for text, chance, length, tokens in zip(texts, chances, lengths, new, strict=True)
        ]


class _FirstLogits(LogitsProcessor):
    """Keeps what the model thinks of some tokens as the first of the answer; changes nothing."""

    def __init__(self, tokens: tuple[int, ...] | None):
        self._tokens = tokens
        self.logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.logits is None and self._tokens is not None:
            self.logits = scores[:, list(self._tokens)].float()
        return scores


def first_tokens(tokenizer, choices: tuple[str, str]) -> tuple[int, int]:
    """The ids with which two answers begin, right after the prompt's last newline.

    Raises:
        ValueError: they begin alike.
    """
    first, second = (tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in choices)
    if first == second:
        raise ValueError(
            f"the tokenizer begins {choices[0]!r} and {choices[1]!r} with the same token: the first token's "
            "probability cannot tell them apart"
        )
    return first, second


def answer_length(tokens: list[int], end: int) -> tuple[int, bool]:
    """Tokens up to and with the first end token, and whether there is none."""
    return (tokens.index(end) + 1, False) if end in tokens else (len(tokens), True)
