"""Where an evaluation lies: a folder whose name changes with whatever decides its answers, so that a rerun finds it."""

import hashlib
from pathlib import Path

from pipelines.identity import digest
from workflows.evaluate.benchmarks.base import Benchmark

_CHUNK = 1 << 20
_ENDINGS = (".json", ".safetensors", ".txt", ".model", ".jinja")


def model_digest(folder: Path) -> str:
    """Ten hex digits of a model folder's content: weights, configuration and tokenizer."""
    whole = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.name.endswith(_ENDINGS):
            one = hashlib.sha256()
            with open(file, "rb") as stream:
                while chunk := stream.read(_CHUNK):
                    one.update(chunk)
            whole.update(f"{file.relative_to(folder).as_posix()} {one.hexdigest()}\n".encode())
    return whole.hexdigest()[:10]


def evaluation_folder(
    root: Path, benchmark: Benchmark, model: Path, seed: int, max_new_tokens: int | None = None
) -> Path:
    """The folder of an evaluation below `root`. Workers and batches do not decide answers and are not in its name."""
    length = max_new_tokens or benchmark.max_new_tokens
    items = [[i.id, i.prompt, i.image, i.source, i.answers, i.type] for i in benchmark.items]
    key = digest(model_digest(model), benchmark.digest, items, length, seed, benchmark.choices)
    return root / f"{benchmark.title.replace('/', '-')}-{key}"
