"""What a request asks of the engine and gets from it, and how the next token of every row is chosen.

A row's choice depends only on its own logits and its own random generator. The same seed therefore gives the same
answer whatever else is in the batch, apart from rounding of the logits. `choose` takes the quick way to each row's
token and waits for them; a device that makes steps on its own has mlmamba/choosing.py. Shapes: n rows, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mlmamba.choosing import draw, draw_nucleus, finite
from mlmamba.image_layout import CutImage
from mlmamba.state_cache import Place
from workflows.serve.grammar import Grammar

LEAST_TEMPERATURE = 0.01  # below it logits / temperature can overflow, so the answer is greedy
_NUCLEUS = 256  # most likely tokens looked at for top_p; nearly always enough, and faster than sorting the vocabulary
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt (l,) and its images as the encoder reads them; with the images' digests, and the places at
    which a state may be found or kept, in ascending order."""

    input_ids: Tensor
    shown: tuple[CutImage, ...] = ()
    images: tuple[bytes, ...] = ()
    places: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Settings:
    """How to answer.

    `stop` strings end the answer and are not part of it. `top_p` and `seed` apply to sampling only; without a seed
    each answer is drawn afresh. `logprobs` is the number of alternatives to report with each token, None for no report.
    `grammar` says what may be answered, None anything.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < LEAST_TEMPERATURE

    @property
    def sampled(self) -> tuple[float, float] | None:
        """Temperature and top_p, None where they do not apply."""
        return None if self.greedy else (self.temperature, self.top_p)


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer as bytes, its log probability, and the most likely alternatives.

    The probability is the model's own, before temperature, top_p and the form of the answer.
    """

    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What a step added to an answer: text that is final, and the report on its tokens where one was asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Seconds from the request's arrival: in the queue, to its first token, and to its end."""

    queued: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Answer:
    """An answer and what it took. `ids` are its tokens with the end token, which `completion_tokens` counts too;
    `cached_tokens` of the prompt were not read, because a state of them was kept."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    timing: Timing | None = field(default=None, compare=False)
    cached_tokens: int = field(default=0, compare=False)


def generator_of(settings: Settings) -> torch.Generator | None:
    """Return the random generator of one answer, from its seed or the system's; None for a greedy answer."""
    if settings.greedy:
        return None
    generator = torch.Generator()
    if settings.seed is None:
        generator.seed()
    else:
        generator.manual_seed(settings.seed)
    return generator


def draw_of(generator: torch.Generator) -> float:
    """The next number of a row, in [0, 1). Drawn on the CPU, so that a seed means the same on every device."""
    return torch.rand((), dtype=torch.float64, generator=generator).item()


def choose(logits: Tensor, settings: list[Settings], generators: list[torch.Generator | None]) -> list[int | None]:
    """Choose the next token of each row.

    Args:
        logits: (n, V) float32; -inf at tokens that must not come.
        settings, generators: one for each row; the generators of greedy rows are not used.

    Returns:
        Token ids; None for a row whose logits are not finite.
    """
    best, ids = logits.max(dim=-1)
    sampled = [row for row, one in enumerate(settings) if not one.greedy]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)
        temperatures = torch.tensor([settings[row].temperature for row in sampled], device=logits.device)
        probabilities = torch.softmax(logits[rows] / temperatures[:, None], dim=-1)
        draws = torch.tensor([draw_of(generators[row]) for row in sampled], dtype=torch.float64, device=logits.device)
        cut = [i for i, row in enumerate(sampled) if settings[row].top_p < 1]
        whole = [i for i, row in enumerate(sampled) if settings[row].top_p >= 1]
        if whole:
            ids[rows[whole]] = draw(probabilities[whole], draws[whole])
        if cut:
            top_p = torch.tensor([settings[sampled[i]].top_p for i in cut], device=logits.device)
            ids[rows[cut]] = _nucleus(probabilities[cut], draws[cut], top_p)
    return [None if token < 0 else token for token in finite(ids, best).tolist()]


def log_probabilities(logits: Tensor, ids: list[int], count: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """Return, for each row of logits (n, V), its id's log probability and the `count` most likely ids with theirs."""
    logs = torch.log_softmax(logits, dim=-1)
    chosen = logs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    values, indices = logs.topk(min(count, logs.shape[1]), dim=-1)
    tops = [list(zip(*pair, strict=True)) for pair in zip(indices.tolist(), values.tolist(), strict=True)]
    return list(zip(chosen, tops, strict=True))


def _nucleus(probabilities: Tensor, draws: Tensor, top_p: Tensor) -> Tensor:
    """`draw_nucleus` of the most likely tokens of (n, V), of all where those have not enough probability."""
    values, indices = probabilities.topk(min(_NUCLEUS, probabilities.shape[1]), dim=-1)
    if bool((values.double().sum(-1) < top_p).any()):
        values, indices = probabilities.sort(dim=-1, descending=True)
    return draw_nucleus(values, indices, draws, top_p)
