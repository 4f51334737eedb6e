"""Operators of Mamba-2 and the one place that chooses how they run.

Three paths compute the same thing: `naive` (the recurrence, for tests), `torch` (chunked, any device) and `cuda`
(mamba_ssm and causal_conv1d). `path_for` picks cuda when the tensor is on a CUDA device and both packages import, else
torch. `force_path("torch")`, as a context manager, overrides the choice for everything inside it; the environment
variable MLMAMBA_OPS does so for a whole process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor

from mlmamba.ops import chunked, convolution, naive
from mlmamba.ops.chunked import ssd_step
from mlmamba.ops.convolution import causal_conv1d_step

PATHS = ("naive", "torch", "cuda")
__all__ = ["PATHS", "causal_conv1d", "causal_conv1d_step", "force_path", "has_kernels", "path_for", "ssd", "ssd_step"]

_forced: ContextVar[str | None] = ContextVar("mlmamba_ops_path", default=None)


@contextmanager
def force_path(path: str) -> Iterator[None]:
    """Run everything inside the block on one path.

    Raises:
        ValueError: `path` is not one of PATHS.
    """
    token = _forced.set(_known(path))
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def has_kernels() -> bool:
    """Whether mamba_ssm and causal_conv1d are installed (not whether there is a GPU)."""
    return all(find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d"))


def path_for(x: Tensor) -> str:
    """Name of the path that a call with `x` takes now."""
    forced = _forced.get() or os.environ.get("MLMAMBA_OPS")
    if forced:
        return _known(forced)
    return "cuda" if x.is_cuda and has_kernels() else "torch"


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int = 64, **kwargs):
    """State-space recurrence on the chosen path; arguments and results as in `naive.ssd`."""
    path = path_for(x)
    if path == "naive":
        return naive.ssd(x, dt, A, B, C, **kwargs)
    module = import_module("mlmamba.ops.cuda") if path == "cuda" else chunked
    return module.ssd(x, dt, A, B, C, chunk_size=chunk_size, **kwargs)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **kwargs):
    """Depthwise causal convolution and SiLU on the chosen path; arguments and results as in `naive.causal_conv1d`."""
    path = path_for(x)
    module = import_module("mlmamba.ops.cuda") if path == "cuda" else naive if path == "naive" else convolution
    return module.causal_conv1d(x, weight, bias, **kwargs)


def _known(path: str) -> str:
    if path not in PATHS:
        raise ValueError(f"unknown operator path {path!r}; choose one of {', '.join(PATHS)}")
    return path
