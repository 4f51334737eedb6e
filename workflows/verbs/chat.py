"""Asking a model from the terminal: one question, or a conversation in which every turn sees the ones before.

The engine of the service answers, for this one client: a later turn reads only what is new in it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from mlmamba.conversation import Turn
from mlmamba.decoding import prepare
from mlmamba.images import ImageError, image_size, open_image
from mlmamba.loading import load_model
from workflows.errors import UsageError, WorkflowError
from workflows.registry import resolve_model
from workflows.serve.engine import Engine
from workflows.serve.options import Limits
from workflows.serve.sampling import Delta, Settings
from workflows.serve.sequence import NoNumbers

_LIMITS = Limits(max_batch=1, deadline_seconds=1e9)  # who asks can stop it


def answer_once(
    reference: str, storage: Path, image: str | None, question: str, max_new_tokens: int, precision: str = "auto"
) -> str:
    """The model's greedy answer to one question about one image (or none)."""
    images = _Shown(image)
    engine = _load(resolve_model(reference, storage).folder, precision)
    return _answer(engine, [Turn("user", question, len(images))], images, max_new_tokens)


def talk(reference: str, storage: Path, image: str | None, precision: str = "auto") -> None:
    """Read questions until an empty line or the end of input, streaming each answer."""
    images = _Shown(image)
    resolved = resolve_model(reference, storage)
    engine = _load(resolved.folder, precision)
    print(f"{resolved.label}. Ask about {image or 'anything'}; an empty line ends.", file=sys.stderr)
    turns: list[Turn] = []
    while question := _ask():
        asked = [*turns, Turn("user", question, 0 if turns else len(images))]
        try:
            answer = _answer(engine, asked, images, 256, lambda delta: print(delta.text, end="", flush=True))
        except UsageError as error:  # the conversation so far stands
            print(error, file=sys.stderr)
            continue
        print()
        turns = [*asked, Turn("assistant", answer)]


def _load(folder: Path, precision: str) -> Engine:
    try:
        model, processor = load_model(folder, precision=precision)
    except ValueError as error:
        raise UsageError(str(error)) from error
    prepare(model, make=False)  # a few answers do not pay for compiling
    return Engine(model, processor, _LIMITS)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


class _Shown:
    """The image of a chat, or none, decoded when it is asked for: what is too long for a prompt never is."""

    def __init__(self, path: str | None):
        self._path, self._data, self._decoded, self.sizes = path, b"", [], []
        if path is not None:
            with self._named():
                self._data = Path(path).read_bytes()
                self.sizes = [image_size(self._data)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Image.Image]:
        if self.sizes and not self._decoded:
            with self._named():
                self._decoded = [open_image(self._data)]
        return iter(self._decoded)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(f"--image {self._path}: {error.strerror}") from error
        except ImageError as error:
            raise UsageError(f"--image {self._path}: {error}") from error


def _answer(
    engine: Engine,
    turns: list[Turn],
    images: _Shown,
    max_new_tokens: int,
    on_delta: Callable[[Delta], None] | None = None,
) -> str:
    try:
        prompt = engine.prepare(turns, images)
    except ValueError as error:
        raise UsageError(str(error)) from error
    future = engine.submit(prompt, Settings(max_new_tokens), on_delta, client="chat")
    try:
        return future.result().text
    except NoNumbers as error:
        raise WorkflowError(str(error)) from error
    finally:
        future.cancel()
