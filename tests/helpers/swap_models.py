"""Tiny models that answer differently, registered for tests and benchmarks of serving, and how each one answers."""

import io
import shutil
from pathlib import Path
from urllib.parse import urlparse

import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from mlmamba.answering import Answerer, Asked
from tests.helpers.registry_server import add_model, add_version
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from workflows.registry.models import open_package
from workflows.registry.register import Example
from workflows.serve.swap import drawn_image
from workflows.train.initial import save

TOKENS = 12
QUESTION = "what is shown?"


def write_model(folder: Path, number: int) -> Path:
    """A model folder; each number has weights of its own."""
    model = tiny_model({"tie_word_embeddings": False}, max_position_embeddings=300)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std())
    save(model, tiny_tokenizer(), folder)
    return folder


def drawn_example(answer: str) -> Example:
    """A stored example with the drawn image of the smoke test, and what is said to have been answered."""
    buffer = io.BytesIO()
    drawn_image().save(buffer, "PNG")
    return Example(buffer.getvalue(), QUESTION, answer, max_tokens=8)


def write_spoiled(folder: Path, model: Path, how: str) -> Path:
    """A copy of a model whose weights are `cut` short on disk, or hold values that are `not finite`."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        weights = load_file(file)
        name = next(name for name in weights if name.endswith("lm_head.weight"))
        weights[name][5] = torch.inf
        save_file(weights, file, metadata={"format": "pt"})
    return folder


def register_models(client: MlflowClient, name: str, folders: list[Path], packages: Path) -> None:
    """Versions 1, 2 and so on; the first is champion. Only it is logged: the others are copies of its package with
    another model in it, which takes no time."""
    first = client.get_model_version(name, add_model(client, name, folders[0]))
    logged = Path(urlparse(client.get_model_version_download_uri(name, str(first.version))).path)
    for number, folder in enumerate(folders[1:], 2):
        package = packages / f"{name}-{number}"
        shutil.copytree(logged, package)
        shutil.rmtree(package / "artifacts")
        shutil.copytree(folder, package / open_package(logged)[0].relative_to(logged.resolve()))
        add_version(client, name, str(package))
    client.set_registered_model_alias(name, "champion", "1")


def answer_of(folder: Path, question: str = QUESTION, image: bytes | None = None, tokens: int = TOKENS) -> str:
    """The model's greedy answer, without any service."""
    return Answerer(folder, tokens).answer([Asked(image, [question])])[0][0]
