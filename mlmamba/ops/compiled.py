"""The part of a decoding step between two products as code that torch compiles for this processor, and that is kept.

Compiling takes some twenty seconds and a C++ compiler, once for a shape of model, for any number of rows; loading what
was compiled takes milliseconds and no compiler. So it is done by a process of its own, which holds up nobody, into a
folder of the user's cache, and all processes of a machine share it.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from mlmamba.ops import step

SECONDS = 300
"""Longest time for compiling."""


class NotCompiled(Exception):
    """Why there is no compiled code, in one line."""


def folder() -> Path:
    """Where compiled code is kept: MLMAMBA_CACHE, or mlmamba in the user's cache folder."""
    own = os.environ.get("MLMAMBA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlmamba"


def between(shape: dict, make: bool) -> Callable[..., Tensor]:
    """`step.between` compiled for a shape of model.

    Args:
        shape: arguments of `_example`.
        make: compile it where it is not there yet; else it is only looked for.

    Raises:
        NotCompiled: there is no compiler, it failed, or there is nothing yet and none is to be made.
    """
    path = folder() / f"between-{_digest(shape)}.pt2"
    if not path.exists():
        if not make:
            raise NotCompiled(f"nothing was compiled for this shape yet (in {folder()})")
        _compile(shape, path)
    return _loaded(path)


@cache
def _loaded(path: Path) -> Callable[..., Tensor]:
    if hasattr(os, "getuid") and path.stat().st_uid not in (os.getuid(), 0):
        raise NotCompiled(f"{path} belongs to another user")
    try:
        run = torch._inductor.aoti_load_package(
            str(path)
        ).loader.boxed_run  # without the sorting of arguments around it
    except Exception as error:  # a damaged file, or one of another build of torch
        path.unlink(missing_ok=True)
        raise NotCompiled(f"{path} does not load, and is removed: {_first_line(error)}") from error
    return lambda *tensors: run(list(tensors))[0]


def _compile(shape: dict, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(f"{path}.lock", timeout=SECONDS):
            if path.exists():  # another process was quicker
                return
            command = [sys.executable, "-m", "mlmamba.ops.compiled", json.dumps(shape), str(path)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except (OSError, TimeoutError, subprocess.TimeoutExpired) as error:
        raise NotCompiled(_first_line(error)) from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no reason given")
        raise NotCompiled(reason[:300])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _digest(shape: dict) -> str:
    """Of all that decides the code: shape, source, torch and the processor's instructions."""
    sources = [Path(module).read_text() for module in (step.__file__, __file__)]
    parts = [json.dumps(shape, sort_keys=True), torch.__version__, _processor(), *sources]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:
        found = [platform.processor()]
    return "\n".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *found])


def _example(heads: int, head_dim: int, state_size: int, groups: int, taps: int, dtype: str) -> tuple[Tensor, ...]:
    """Arguments of `step.between` that are tensors, of four rows."""
    kind = getattr(torch, dtype)
    inner, b = heads * head_dim, 4
    d = inner + 2 * groups * state_size
    shapes = [(b, inner + d + heads), (b, taps - 1, d), (b, heads, head_dim, state_size), (taps, d), (d,)]
    shapes += [(heads,), (heads,), (heads,), (inner,)]
    dtypes = [kind, kind, torch.float32, kind, kind, *[torch.float32] * 3, kind]
    return tuple(torch.randn(s).to(t) for s, t in zip(shapes, dtypes, strict=True))


class _Between(torch.nn.Module):
    def __init__(self, *constants):
        super().__init__()
        self.constants = constants

    def forward(self, zxBCdt, conv, ssm, taps, bias, A, dt_bias, D, weight):
        return step.between(zxBCdt, conv, ssm, taps, bias, A, dt_bias, D, weight, *self.constants)


def _main(shape: dict, path: Path) -> None:
    """Compile and write, the file whole or not at all."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    os.nice(10)
    get_cpp_compiler()  # raises at once where there is none
    constants = [shape.pop(name) for name in ("eps", "norm_groups", "dt_limit")]
    tensors = _example(**shape)
    module = _Between(constants[0], shape["groups"], constants[1], tuple(constants[2]))
    rows = torch.export.Dim("rows", min=1, max=2**16)
    changing = ({0: rows},) * 3 + (None,) * (len(tensors) - 3)
    new = path.with_name(f"{path.stem}.{os.getpid()}.pt2")
    try:
        with torch.no_grad():
            program = torch.export.export(module, tensors, dynamic_shapes=changing)
            options = {"cpp.dynamic_threads": True, "compile_threads": 1}
            torch._inductor.aoti_compile_and_package(program, package_path=str(new), inductor_configs=options)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), Path(sys.argv[2]))
