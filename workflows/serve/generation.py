"""What the engine is asked, and what it answers."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

LEAST_TEMPERATURE = 0.01  # under it the logits would overflow, and sampling is greedy for all purposes
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt (l,) and its pictures, uint8 (n, 3, s, s) or None."""

    input_ids: Tensor
    pixels: Tensor | None


@dataclass(frozen=True)
class Settings:
    """How to answer.

    `stop` strings end the answer and are not part of it. `top_p` and `seed` matter to sampling only; without a seed
    every answer is another. `logprobs` is the number of alternatives to report with each token, None for no report.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < LEAST_TEMPERATURE


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer as bytes, its log probability, and the most likely alternatives.

    The probability is the model's own, before temperature and top_p.
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
    """An answer and what it took. `ids` are its tokens with the end token, which `completion_tokens` counts too."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    timing: Timing | None = field(default=None, compare=False)
