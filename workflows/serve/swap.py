"""Replace the model of a running replica, after a smoke test, without failing a request.

`load` reads a version and asks it one question (`Smoke`) while the old model goes on answering. `Swapper` then puts the
new model in its place between two requests; the old one finishes the answers that it began, and its memory is freed.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from pydantic import Field
from torch import Tensor

from mlmamba.conversation import Turn
from mlmamba.images import WIDEST, ImageError, open_image
from mlmamba.loading import load_model
from pipelines.config import StrictModel
from workflows.errors import WorkflowError
from workflows.evaluate.benchmarks.base import normalise
from workflows.registry import ResolvedModel
from workflows.registry.register import Example
from workflows.serve.engine import Engine
from workflows.serve.options import Limits
from workflows.serve.sampling import Settings
from workflows.serve.service import Served, Service

logger = logging.getLogger(__name__)
_SECONDS = 120.0  # for one answer of a few tokens; the deadline that requests have by default is longer
_QUESTION, _TOKENS = "What is shown?", 8
_ROUNDING = 0.25
"""How much less likely than the likeliest a token of the stored answer may be, in standard deviations of the logits at
its place: another machine or precision moves logits by a few hundredths of one."""
_NOTHING = 1e-6
"""Logits that differ by less than this share of their largest are the same."""


class SwapOptions(StrictModel):
    """How a replica follows its alias. One that serves a fixed version or a folder has nothing to follow."""

    poll_seconds: float = Field(5, gt=0)
    """Time between two looks at the alias."""
    jitter: float = Field(0.2, ge=0, lt=1)
    """Share by which that time varies at random, so that replicas do not look all at once."""
    retry_seconds: float = Field(60, gt=0)
    """Time until a refused version is tried again; doubles with each refusal. Moving the alias tries at once."""
    retry_most_seconds: float = Field(3600, gt=0)
    """Longest time between two tries."""
    copies: int = Field(3, ge=2)
    """Most models in memory at once: the served one, one being loaded, and those that finish their last answers. With 2
    a new one is loaded only when the old one has finished."""
    same_answer: bool = False
    """Refuse a version whose answer to its stored image is not word for word the one that the evaluation got. Leave it
    off where serving computes on other hardware or in another precision: a difference that rounding can make, because
    the stored answer is about as likely, is logged then. Any other is refused in either case."""


class Refused(WorkflowError):
    """A version that cannot be loaded or failed its smoke test; the message says why."""


class SmokeFailed(Exception):
    """A model failed its smoke test; the message says how."""


@dataclass(frozen=True)
class Refusal:
    """A version that a replica does not serve, and when it is tried again."""

    version: str
    reason: str
    when: float
    """Seconds since 1970."""
    tries: int
    next_try: float
    """Seconds since 1970."""


class Swapper:
    """Puts versions into service, one at a time.

    Args:
        service: what the replica serves.
        load: loads a version and tests it; raises Refused, or another WorkflowError when that could not be decided.
        wanted: returns the version that the alias names, asked again after a load; None where that is unknown.
        on_taken: called with a version when it begins to be served.
        on_refused: called with a version that was refused.
    """

    def __init__(
        self,
        service: Service,
        options: SwapOptions,
        load: Callable[[str], Served],
        wanted: Callable[[], str | None] = lambda: None,
        on_taken: Callable[[Served], None] = lambda served: None,
        on_refused: Callable[[Refusal], None] = lambda refusal: None,
    ):
        self._service, self._options, self._load, self._wanted = service, options, load, wanted
        self._on_taken, self._on_refused = on_taken, on_refused
        self._draining: list[threading.Thread] = []
        self.refusal: Refusal | None = None
        self.loading: str | None = None

    @property
    def version(self) -> str | None:
        """The version that is served."""
        served = self._service.served
        return None if served is None else served.source.version

    def offer(self, version: str) -> bool:
        """Load a version and serve it, unless it is served already or was refused lately. Returns whether it is served.

        Raises:
            WorkflowError: `load` could not decide, as when the registry does not answer; nothing has changed.
        """
        if version == self.version:
            self.refusal = None
            return True
        if self.refusal is not None and self.refusal.version != version:
            self.refusal = None  # someone moved the alias since; the version may be tried at once when it comes back
        if self.refusal is not None and time.time() < self.refusal.next_try:
            return False
        self._make_room()
        self.loading = version
        try:
            served = self._load(version)
        except Refused as error:
            self.refuse(version, str(error))
            return False
        finally:
            self.loading = None
        if self._wanted() not in (None, version):
            logger.warning("%s was loaded, but the alias has moved on meanwhile", served.source.label)
            self._drain(served)
            return False
        before, self._service.served = self._service.served, served
        self.refusal = None
        logger.warning("%s is served now%s", served.source.label, f", after {before.source.label}" if before else "")
        if before is not None:
            self._drain(before)
        self._on_taken(served)
        return True

    def refuse(self, version: str, reason: str) -> None:
        """Note that a version cannot be served, and when to try it again: the wait doubles with each refusal."""
        known = self.refusal if self.refusal is not None and self.refusal.version == version else None
        tries = (known.tries if known else 0) + 1
        wait = min(self._options.retry_seconds * 2 ** (tries - 1), self._options.retry_most_seconds)
        self.refusal = Refusal(version, reason, time.time(), tries, time.time() + wait)
        logger.error(
            "version %s is refused, %s stays; it is tried again in %.0f s: %s", version, self.version, wait, reason
        )
        self._on_refused(self.refusal)

    def as_dict(self) -> dict:
        """What is served, loaded and refused, as plain data."""
        refusal = None if self.refusal is None else asdict(self.refusal)
        served = self._service.served
        return {
            "serving": None if served is None else served.source.label,
            "loading": self.loading,
            "refused": refusal,
            "draining": sum(thread.is_alive() for thread in self._draining),
        }

    def wait_for_drains(self) -> None:
        """Wait until every replaced model has given its last answer."""
        for thread in list(self._draining):
            thread.join()

    def _make_room(self) -> None:
        """Wait until one more model may be in memory: at most `copies`, the served and the finishing ones included."""
        while True:
            self._draining = [thread for thread in self._draining if thread.is_alive()]
            if len(self._draining) <= self._options.copies - 2:
                return
            self._draining[0].join()

    def _drain(self, served: Served) -> None:
        thread = threading.Thread(target=_drain, args=(served,), name="drain", daemon=True)
        self._draining.append(thread)
        thread.start()


def _drain(served: Served) -> None:
    """Let a replaced model give its last answers, then free its memory."""
    label = served.source.label
    try:
        served.engine.close()
    except Exception:
        logger.exception("%s could not be stopped", label)
        return
    del served
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    logger.warning("%s has given its last answer", label)


def load(
    source: ResolvedModel,
    limits: Limits,
    threads: int | None,
    same_answer: bool = False,
    quiet: bool = False,
    precision: str = "auto",
    exact: bool = False,
) -> Served:
    """Load a model, give it an engine and run its smoke test.

    Args:
        source: the folder and where it came from.
        limits: of the engine.
        threads: torch threads of the engine.
        same_answer: refuse a model whose answer to its stored example differs from the stored one, instead of logging
            the difference.
        quiet: load in one thread, to leave the cores to the model that answers in this process meanwhile.
        precision, exact: as `load_model` takes them.

    Raises:
        Refused: it cannot be loaded, or failed its smoke test.
    """
    if quiet:
        torch.set_num_threads(1)  # of the calling thread
    engine = None
    try:
        if not any(source.folder.glob("*.safetensors")):
            raise SmokeFailed(f"there are no safetensors in {source.folder}")
        model, processor = load_model(source.folder, precision=precision, exact=exact)
        smoke = Smoke(source.example)
        smoke.check_logits(model, processor)
        gap = smoke.gap(model, processor)
        engine = Engine(model, processor, limits, threads)
        _compare(smoke.expected, smoke.check_answer(engine), source.label, same_answer or gap > _ROUNDING)
        return Served(engine, source)
    except Exception as error:  # whatever a damaged model raises, it must not stop what is served now
        if engine is not None:
            engine.close()
        reason = str(error) if isinstance(error, SmokeFailed) else f"{type(error).__name__}: {error}"
        raise Refused(f"{source.label}: {reason[:1000]}") from error


def _compare(expected: str | None, answer: str, label: str, required: bool) -> None:
    if expected is None or normalise(answer) == normalise(expected):
        return
    message = f"its answer to the stored image is {answer!r}, it was {expected!r} when it was registered"
    if required:
        raise SmokeFailed(message)
    logger.warning("%s: %s", label, message)


class Smoke:
    """Smoke test of a loaded model: finite logits that depend on the text and the image, and an answer.

    With a stored example the answer is its, or one that is as likely; `load` compares.

    Args:
        example: folder with the question that registration stored with the model; None: ask about a drawn image.

    Raises:
        SmokeFailed: there is such a folder and it cannot be read.
    """

    def __init__(self, example: Path | None):
        self.expected: str | None = None
        self._question, self._tokens = _QUESTION, _TOKENS
        self._image = drawn_image()
        if example is None:
            return
        try:
            stored = Example.load(example)
            self._image = open_image(stored.image, WIDEST)
        except (OSError, ValueError, TypeError, KeyError, ImageError) as error:
            raise SmokeFailed(f"its stored example cannot be read: {type(error).__name__}: {error}") from error
        self._question, self._tokens, self.expected = stored.question, stored.max_tokens, stored.answer

    @torch.inference_mode()
    def check_logits(self, model, processor) -> None:
        """Run the bare model on the prompt, before an engine owns it, then on another image and on text alone.

        Raises:
            SmokeFailed: a logit is not finite, or none changes with the image or with the text.
        """
        text = processor.prompt([Turn("user", self._question)])
        prompt = processor.prompt([Turn("user", self._question, images=1)])
        alone = _logits(model, processor(text=text), "a question without an image")
        if _same(alone[:, 1:], alone[:, :-1]):
            raise SmokeFailed("its logits are the same after every token: they do not depend on the text")
        inputs = processor([self._image], prompt)
        after = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[-1])
        logits = _logits(model, inputs, "the stored image")[:, after:].clone()
        other = _logits(model, processor([ImageOps.invert(drawn_image())], prompt), "another image")[:, after:]
        if _same(logits, other):
            raise SmokeFailed("its logits after an image are the same for another: they do not depend on the image")

    @torch.inference_mode()
    def gap(self, model, processor) -> float:
        """How far the stored answer is from being the likeliest: see `largest_gap`. 0 where there is none."""
        if self.expected is None:
            return 0.0
        end = processor.tokenizer.eos_token_id
        answer = processor.tokenizer(self.expected, add_special_tokens=False)["input_ids"][: self._tokens] or [end]
        inputs = processor([self._image], processor.prompt([Turn("user", self._question, images=1)]))
        told = torch.tensor([answer])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], told], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = model(**inputs.to(model.device), logits_to_keep=len(answer) + 1).logits[:, :-1]
        return largest_gap(logits[0].cpu(), told[0])

    def check_answer(self, engine: Engine) -> str:
        """Return the engine's greedy answer. Raises SmokeFailed when there is none in time, or it is empty."""
        prompt = engine.prepare([Turn("user", self._question, images=1)], [self._image])
        try:
            answer = engine.submit(prompt, Settings(max_tokens=self._tokens)).result(_SECONDS)
        except FutureTimeout as error:
            raise SmokeFailed(f"no answer to the stored image within {_SECONDS:.0f} s") from error
        if answer.completion_tokens < 1:
            raise SmokeFailed("the answer to the stored image has no token")
        return answer.text


def largest_gap(logits: Tensor, tokens: Tensor) -> float:
    """The most by which one of `tokens` (n,) is behind the likeliest at its place in `logits` (n, v), in standard
    deviations of the logits there."""
    logits = logits.float()
    behind = logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]
    return float((behind / logits.std(-1).clamp_min(1e-12)).max())


def _logits(model, inputs, what: str) -> Tensor:
    """Logits (1, l, v). Raises SmokeFailed when one is not finite."""
    logits = model(**inputs.to(model.device)).logits
    if bad := int((~torch.isfinite(logits)).sum()):
        raise SmokeFailed(f"{bad:,} of {logits.numel():,} logits of {what} are not finite")
    return logits


def _same(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= _NOTHING * float(torch.maximum(one.abs().max(), other.abs().max()))


def drawn_image() -> Image.Image:
    """Draw the test image, always the same: 64 x 48 pixels with edges, colours and a gradient."""
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.rectangle((6, 8, 28, 38), fill=(200, 30, 40))
    draw.ellipse((34, 12, 58, 36), fill=(30, 60, 210))
    return image
