"""The test that a version must pass before it is served: one question about one picture.

The picture, the question and the answer are those that registration stored with the model; one without them is asked
about a drawn picture. Every logit must be finite, and the engine must give an answer. Whether the answer must be the
stored one is the caller's choice: another precision or another machine may rightly give another.
"""

from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

from mlmamba.conversation import Turn
from mlmamba.pictures import PictureError, open_picture
from workflows.registry.example import Example

if TYPE_CHECKING:
    from workflows.serve.engine import Engine

_SECONDS = 120.0  # for one answer of a few tokens; the deadline that requests have by default is longer
_QUESTION, _TOKENS = "What is shown?", 8


class SmokeFailed(Exception):
    """The version must not be served; the message says what it did."""


class Smoke:
    """One question, asked of a loaded model.

    Args:
        example: folder that registration stored with the model, or None.

    Raises:
        SmokeFailed: there is such a folder and it cannot be read.
    """

    def __init__(self, example: Path | None):
        self.expected: str | None = None
        self._question, self._tokens = _QUESTION, _TOKENS
        self._picture = drawn_picture()
        if example is None:
            return
        try:
            stored = Example.load(example)
            self._picture = open_picture(stored.picture)
        except (OSError, ValueError, TypeError, KeyError, PictureError) as error:
            raise SmokeFailed(f"its stored example cannot be read: {type(error).__name__}: {error}") from error
        self._question, self._tokens, self.expected = stored.question, stored.max_tokens, stored.answer

    @torch.inference_mode()
    def check_logits(self, model, processor) -> None:
        """Read the prompt with the bare model, before an engine owns it. Raises SmokeFailed."""
        inputs = processor([self._picture], processor.prompt([Turn("user", self._question, images=1)]))
        logits = model(**inputs.to(model.device)).logits
        bad = int((~torch.isfinite(logits)).sum())
        if bad:
            raise SmokeFailed(f"{bad:,} of {logits.numel():,} logits of the stored picture are not finite")

    def check_answer(self, engine: "Engine") -> str:
        """The engine's greedy answer. Raises SmokeFailed when it gives none."""
        from workflows.serve.generation import Settings

        prompt = engine.prepare([Turn("user", self._question, images=1)], [self._picture])
        try:
            answer = engine.submit(prompt, Settings(max_tokens=self._tokens)).result(_SECONDS)
        except FutureTimeout as error:
            raise SmokeFailed(f"no answer to the stored picture within {_SECONDS:.0f} s") from error
        if answer.completion_tokens < 1:
            raise SmokeFailed("the answer to the stored picture has no token")
        return answer.text


def drawn_picture() -> Image.Image:
    """A picture with edges, colours and a slope of brightness, the same every time; 64 x 48."""
    picture = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((6, 8, 28, 38), fill=(200, 30, 40))
    draw.ellipse((34, 12, 58, 36), fill=(30, 60, 210))
    return picture
