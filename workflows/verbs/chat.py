"""Asking a model from the terminal: one question, or a conversation in which every turn sees the ones before."""

import sys
from pathlib import Path

import torch
from transformers import TextStreamer

from mlmamba.conversation import Turn
from mlmamba.images import ImageError, open_image
from mlmamba.loading import load_model
from workflows.errors import UsageError
from workflows.registry import resolve_model


def answer_once(
    reference: str, storage: Path, image: str | None, question: str, max_new_tokens: int, precision: str = "auto"
) -> str:
    """The model's greedy answer to one question about one image (or none)."""
    opened = _open(image)
    model, processor = _load(resolve_model(reference, storage).folder, precision)
    return _generate(model, processor, [Turn("user", question, images=int(bool(opened)))], opened, max_new_tokens)


def talk(reference: str, storage: Path, image: str | None, precision: str = "auto") -> None:
    """Read questions until an empty line or the end of input, streaming each answer."""
    opened = _open(image)
    resolved = resolve_model(reference, storage)
    model, processor = _load(resolved.folder, precision)
    print(f"{resolved.label}. Ask about {image or 'anything'}; an empty line ends.", file=sys.stderr)
    turns: list[Turn] = []
    while question := _ask():
        turns.append(Turn("user", question, images=int(bool(opened) and not turns)))
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        turns.append(Turn("assistant", _generate(model, processor, turns, opened, 256, streamer)))


def _load(folder: Path, precision: str):
    try:
        return load_model(folder, precision=precision)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _open(image: str | None):
    if image is None:
        return None
    try:
        return open_image(Path(image).read_bytes())
    except OSError as error:
        raise UsageError(f"--image {image}: {error.strerror}") from error
    except ImageError as error:
        raise UsageError(f"--image {image}: {error}") from error


@torch.inference_mode()
def _generate(model, processor, turns, image, max_new_tokens, streamer=None) -> str:
    try:
        inputs = processor(images=image, text=processor.prompt(turns)).to(model.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
