"""The finished stage as a model folder: every tensor of the model, whatever was frozen and however it was sharded."""

import contextlib
import shutil
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file


def export_model(engine, start_from: Path, out: Path, rank: int) -> None:
    """Write the trained model beside and rename; a collective call under ZeRO-3.

    Config and processor are those of `start_from`: a stage changes values, not shapes. The tensor names must be exactly
    those of `start_from` (ZeRO-1's own consolidation, for one, silently drops frozen tensors).

    Raises:
        RuntimeError: a tensor is missing, extra or of another shape.
    """
    state = _gather(engine)
    if rank == 0:
        with safe_open(start_from / "model.safetensors", framework="pt") as source:
            expected = {name: source.get_slice(name).get_shape() for name in source.keys()}  # noqa: SIM118
        tensors = {name: value for name, value in state.items() if name in expected}
        got = {name: list(value.shape) for name, value in tensors.items()}
        if got != expected:
            raise RuntimeError(f"the export does not hold the model: {_differences(expected, got)[:5]}")
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in start_from.iterdir():
            if file.name != "model.safetensors":
                shutil.copy2(file, partial / file.name)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed before it could mark it finished
        partial.replace(out)
    dist.barrier()


def _gather(engine) -> dict[str, torch.Tensor]:
    """State dict on the CPU, in float32, whole on every rank (ZeRO-3 gathers one parameter at a time)."""
    module = engine.module
    sharded = engine.zero_optimization_stage() == 3
    state = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        gathered = deepspeed.zero.GatheredParameters([parameter]) if sharded else contextlib.nullcontext()
        with gathered:
            state[name] = parameter.detach().float().cpu().clone()
    for name, buffer in module.named_buffers():
        state[name] = buffer.detach().cpu().clone()
    return state


def _differences(expected: dict, got: dict) -> list[str]:
    names = sorted(expected.keys() | got.keys())
    return [f"{n}: expected {expected.get(n)}, got {got.get(n)}" for n in names if expected.get(n) != got.get(n)]
