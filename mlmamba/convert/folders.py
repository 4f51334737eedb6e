"""Where a checkpoint comes from and where it goes: local folders and hub names, and folders written whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def find_folder(source: str | Path) -> Path:
    """The folder itself, or the local copy of a hub repository, fetched if need be: safetensors where it has them.

    Raises:
        FileNotFoundError: it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or Path(source).is_absolute() or len(Path(source).parts) > 2:
        raise FileNotFoundError(f"there is no folder {source}")
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "pytorch_model*.bin"]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{source} is neither a folder nor a model that the hub gives: {error}") from error
    return folder


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `destination` when the block ends and vanishes when it fails.

    Raises:
        FileExistsError: something is at `destination` already.
    """
    destination = Path(destination)
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists already; delete it or choose another place")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        partial.replace(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy a tokenizer's files from one model folder to another, where there are any."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, destination / name)
