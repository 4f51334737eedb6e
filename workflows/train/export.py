"""Export a finished stage as a model folder with every tensor, whatever was frozen and however it was sharded."""

import contextlib
import os
import shutil
from pathlib import Path

import deepspeed
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from workflows.train.job import MARK
from workflows.train.stage import adapted_layers, merge, plain_name


def export_model(engine, start_from: Path, out: Path, rank: int, mark: str = "", instead: Path | None = None) -> None:
    """Write the trained model to a temporary folder and rename it to `out`. Rank 0 writes; collective under ZeRO-3.

    Config and processor are copied from `start_from`, because a stage changes values and not shapes. Names and shapes
    of the tensors must be those of `start_from`: ZeRO-1's own consolidation, for one, silently drops frozen tensors.

    Args:
        mark: text of the folder's stage.json; empty: write none.
        instead: a file of tensors, such as `gather` gives, that count in place of the engine's; read by rank 0.

    Raises:
        RuntimeError: a tensor is missing, extra or of another shape.
        OSError: the folder cannot be written.
    """
    state = gather(engine)
    if rank:
        return
    try:
        state |= load_file(instead) if instead else {}
    except SafetensorError as error:
        raise OSError(f"{instead} is damaged: {error}") from error
    with safe_open(start_from / "model.safetensors", framework="pt") as source:
        expected = {name: source.get_slice(name).get_shape() for name in source.keys()}  # noqa: SIM118
    tied = {name for name in state if name not in expected and _is_copy(state, name, expected)}
    tensors = {name: value for name, value in state.items() if name not in tied}
    got = {name: list(value.shape) for name, value in tensors.items()}
    if got != expected:
        raise RuntimeError(f"the export does not hold the model: {_differences(expected, got)[:5]}")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    for left in out.parent.glob(f".{out.name}.*.partial"):  # of a run that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for file in start_from.iterdir():
            if file.name not in ("model.safetensors", MARK):
                shutil.copy2(file, partial / file.name)
        if mark:
            (partial / MARK).write_text(mark)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors raises this when the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(str(error)) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)  # a folder of other data, or of a run that was killed after it wrote
    partial.replace(out)


def gather(engine, changed: bool = False) -> dict[str, torch.Tensor]:
    """Gather the plain model's state dict on rank 0: on the CPU, in float32 (under ZeRO-3 one parameter at a time).

    Adapters are merged into the weights that they adapt. Empty on the other ranks.

    Args:
        changed: only what the stage may have changed: parameters that train or are adapted, and buffers.
    """
    module, rank = engine.module, engine.global_rank
    sharded = engine.zero_optimization_stage() == 3
    adapted = adapted_layers(module)
    state = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        plain = plain_name(name)
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        if plain is None or (changed and layer is None and not parameter.requires_grad):
            continue
        with deepspeed.zero.GatheredParameters([parameter]) if sharded else contextlib.nullcontext():
            value = parameter.detach().float().cpu().clone() if sharded or rank == 0 else None
        if layer is not None and name.endswith(".base_layer.weight"):
            value = merge(layer, value, sharded) if value is not None else None
        if rank == 0:
            state[plain] = value
    if rank == 0:
        persistent = module.state_dict().keys()  # buffers that are rebuilt with the model are not saved
        state |= {name: b.detach().cpu().clone() for name, b in module.named_buffers() if name in persistent}
    return state


def _is_copy(state: dict[str, torch.Tensor], name: str, expected: dict) -> bool:
    """Whether a tensor that the file does not hold is another name of one that it does (tied embeddings)."""
    return any(
        state[other].shape == state[name].shape and torch.equal(state[other], state[name])
        for other in expected
        if other in state
    )


def _differences(expected: dict, got: dict) -> list[str]:
    names = sorted(expected.keys() | got.keys())
    return [f"{n}: expected {expected.get(n)}, got {got.get(n)}" for n in names if expected.get(n) != got.get(n)]
