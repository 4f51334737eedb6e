"""One batch of prompts to answers: left-padded, each row ending by its own length limit, end token or stop string.

Rows do not see each other: padding is masked, so a greedy answer is the one that the prompt gets alone.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

LEAST_TEMPERATURE = 0.01  # under it the logits would overflow, and sampling is greedy for all purposes


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt (l,) and its pictures, uint8 (n, 3, s, s) or None."""

    input_ids: Tensor
    pixels: Tensor | None


@dataclass(frozen=True)
class Settings:
    """How to answer. `stop` strings end the answer and are not part of it; `top_p` and `seed` matter to sampling."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < LEAST_TEMPERATURE


@dataclass(frozen=True)
class Answer:
    """An answer and what it took. `completion_tokens` counts the end token."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@torch.inference_mode()
def generate(model, processor, prompts: list[Prompt], settings: list[Settings]) -> list[Answer]:
    """Answers to prompts, in order.

    Args:
        settings: one for each prompt. Several prompts must all be greedy; a sampled answer is made alone, so that its
            seed decides it whatever else is asked.
    """
    sampled = not settings[0].greedy
    if len(prompts) > 1 and not all(s.greedy for s in settings):
        raise ValueError("prompts that sample are answered one at a time")
    inputs = _collate(model, processor, prompts)
    ends = _Ends(model, processor.tokenizer, inputs["input_ids"].shape[1], settings)
    sampling = {"do_sample": False}
    if sampled:
        one = settings[0]
        sampling = {"do_sample": True, "temperature": one.temperature, "top_p": one.top_p, "top_k": 0}
    with torch.random.fork_rng(enabled=sampled):
        if sampled:
            torch.seed() if one.seed is None else torch.manual_seed(one.seed)
        ids = model.generate(
            **inputs,
            **sampling,
            max_new_tokens=max(s.max_tokens for s in settings),
            stopping_criteria=StoppingCriteriaList([ends]),
            use_cache=True,
        )
    return [ends.answer(row, ids[row], len(prompt.input_ids)) for row, prompt in enumerate(prompts)]


def _collate(model, processor, prompts: list[Prompt]) -> dict[str, Tensor]:
    longest = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), processor.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)  # from lengths: the pad id is also the end token
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.input_ids) :] = prompt.input_ids
        mask[row, longest - len(prompt.input_ids) :] = 1
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels).to(model.device)
    return inputs


class _Ends(StoppingCriteria):
    """Ends each row for its own reason and remembers where and why."""

    def __init__(self, model, tokenizer, prompt_length: int, settings: list[Settings]):
        end = model.generation_config.eos_token_id
        self._end_ids = set(end if isinstance(end, list) else [end])
        self._tokenizer, self._prompt_length, self._settings = tokenizer, prompt_length, settings
        self._ended: list[tuple[int, str] | None] = [None] * len(settings)

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        """Which rows are finished, after each new token."""
        length = input_ids.shape[1] - self._prompt_length
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self._ended[row] is None:
                self._ended[row] = self._end(row, token, input_ids[row], length)
        return torch.tensor([ended is not None for ended in self._ended], device=input_ids.device)

    def _end(self, row: int, token: int, ids: Tensor, length: int) -> tuple[int, str] | None:
        settings = self._settings[row]
        if token in self._end_ids:
            return length, "stop"
        if settings.stop and _first(self._text(ids, length), settings.stop) is not None:
            return length, "stop"
        return (length, "length") if length >= settings.max_tokens else None

    def _text(self, ids: Tensor, length: int) -> str:
        new = ids[self._prompt_length : self._prompt_length + length]
        return self._tokenizer.decode(new, skip_special_tokens=True)

    def answer(self, row: int, ids: Tensor, prompt_tokens: int) -> Answer:
        """The answer of a finished row."""
        length, reason = self._ended[row]
        text = self._text(ids, length)
        return Answer(text[: _first(text, self._settings[row].stop)].strip(), reason, prompt_tokens, length)


def _first(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first stop string begins, or None."""
    return min((place for place in map(text.find, stop) if place >= 0), default=None)
