"""Reading weight files: safetensors and torch checkpoints, whole or in shards, and comparing them with what is needed.

torch checkpoints are read with `weights_only=True`: nothing in them is executed. Tensors are mapped from the file, not
copied, so reading costs no memory until they are used.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# In the order of preference; the first of each pair may be in shards, listed by the second.
FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """All tensors of one safetensors or torch file, with the dtypes that they have there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds anything but a dict of tensors.
    """
    tensors = read_checkpoint(file)
    odd = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{file} is not a dict of tensors: {odd[0]!r} is a {type(tensors[odd[0]]).__name__}")
    return tensors


def read_checkpoint(file: str | Path) -> dict:
    """The dict of one safetensors or torch file; that of a torch file may be nested. Errors as in `read_tensors`."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        # Files of torch before 1.6 are no zip archives; those cannot be mapped and are read into memory.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # each format has errors of its own, down to pickle's
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"cannot read {file}: it holds a {type(content).__name__}, not a dict")
    return dict(content)


def read_folder(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a model folder: model.safetensors, pytorch_model.bin, or the shards of either.

    Raises:
        FileNotFoundError: there are none of these files, or a shard is missing.
        ValueError: a file cannot be read, or two shards hold the same tensor.
    """
    folder = Path(folder)
    for whole, index in FILES:
        if (folder / whole).is_file():
            return read_tensors(folder / whole)
        if (folder / index).is_file():
            return _read_shards(folder, index)
    raise FileNotFoundError(f"{folder} holds no weights: none of {', '.join(name for pair in FILES for name in pair)}")


def _read_shards(folder: Path, index: str) -> dict[str, Tensor]:
    try:
        places = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / index} is no index of shards: {error}") from error
    tensors = {}
    for shard in sorted(set(places.values())):
        found = read_tensors(folder / shard)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{folder / shard} holds {twice[0]!r}, which an earlier shard holds too")
        tensors |= found
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise ValueError(f"{index} promises {len(absent)} tensors that the shards lack, first {absent[:3]}")
    return tensors


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes of two sets of tensors; those of `expected` may be on the meta device.

    Raises:
        ValueError: tensors are missing or unexpected or of another shape; how many, and the first names.
    """
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{len(missing)} of {len(expected)} tensors are missing, first {missing[:3]}")
    if unexpected := [name for name in found if name not in expected]:
        problems.append(f"{len(unexpected)} are unexpected, first {unexpected[:3]}")
    shapes = [
        f"{name} is {tuple(value.shape)}, not {tuple(expected[name].shape)}"
        for name, value in found.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape, first {shapes[0]}")
    if problems:
        raise ValueError(f"{source} does not fit: {'; '.join(problems)}")
