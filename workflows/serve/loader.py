"""From a version in the registry to a model that is ready to answer, or the reason why it must not."""

import logging

import torch

from mlmamba.loading import load_model
from workflows.evaluate.score import normalise
from workflows.registry import ResolvedModel
from workflows.serve.engine import Engine
from workflows.serve.limits import Limits
from workflows.serve.service import Served
from workflows.serve.smoke import Smoke, SmokeFailed
from workflows.serve.swap import Refused

logger = logging.getLogger(__name__)


def load(
    source: ResolvedModel, limits: Limits, threads: int | None, same_answer: bool = False, quiet: bool = False
) -> Served:
    """Load a model, test it and give it an engine.

    Args:
        source: the folder and where it came from.
        limits: of the engine.
        threads: torch threads of the engine.
        same_answer: refuse a model whose answer to its stored example is not the stored one; else that is logged.
        quiet: another model answers in this process meanwhile: load in one thread, to leave it the cores.

    Raises:
        Refused: it cannot be loaded, or failed its smoke test.
    """
    if quiet:
        torch.set_num_threads(1)  # of the calling thread
    engine = None
    try:
        if not any(source.folder.glob("*.safetensors")):
            raise SmokeFailed(f"there are no safetensors in {source.folder}")
        model, processor = load_model(source.folder)
        smoke = Smoke(source.example)
        smoke.check_logits(model, processor)
        engine = Engine(model, processor, limits, threads)
        _compare(smoke.expected, smoke.check_answer(engine), source.label, same_answer)
        return Served(engine, source)
    except Exception as error:  # whatever a damaged model raises, it must not stop what is served now
        if engine is not None:
            engine.close()
        reason = str(error) if isinstance(error, SmokeFailed) else f"{type(error).__name__}: {error}"
        raise Refused(f"{source.label}: {reason[:1000]}") from error


def _compare(expected: str | None, answer: str, label: str, required: bool) -> None:
    if expected is None or normalise(answer) == normalise(expected):
        return
    message = f"its answer to the stored picture is {answer!r}, it was {expected!r} when it was registered"
    if required:
        raise SmokeFailed(message)
    logger.warning("%s: %s", label, message)
