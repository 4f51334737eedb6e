"""Operators of Mamba-2 and the one place that chooses how they run.

Three paths compute the same thing: `naive` (the recurrence, for tests), `torch` (chunked, any device) and `cuda`
(mamba_ssm and causal_conv1d). `path_for` picks cuda for an operator when the tensor is on a CUDA device and the
operator's package imports, else torch. `force_path("torch")`, as a context manager, overrides the choice for everything
inside it; the environment variable MLMAMBA_OPS does so for a whole process.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module

from torch import Tensor

from mlmamba.ops import chunked, convolution, naive
from mlmamba.ops.chunked import ssd_step
from mlmamba.ops.convolution import causal_conv1d_step

PATHS = ("naive", "torch", "cuda")
__all__ = [
    "PATHS",
    "causal_conv1d",
    "causal_conv1d_step",
    "force_path",
    "has_kernels",
    "kernel_problem",
    "path_for",
    "ssd",
    "ssd_step",
]

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


OPERATORS = {"ssd": "mamba_ssm", "causal_conv1d": "causal_conv1d"}
"""The operators that have a CUDA kernel, and the package that it comes from."""


@cache
def kernel_problem(operator: str) -> str:
    """Why an operator's CUDA kernel cannot be used, or "" when its package imports.

    A package that was built for another torch is found and does not import, so it is imported, once.
    """
    try:
        import_module("mlmamba.ops.cuda").LOADERS[operator]()
    except Exception as error:  # an extension of another torch fails in more ways than ImportError
        return f"{OPERATORS[operator]} does not import: {type(error).__name__}: {str(error).strip()[:300]}"
    return ""


def has_kernels() -> bool:
    """Whether mamba_ssm and causal_conv1d can be used (not whether there is a GPU)."""
    return not any(map(kernel_problem, OPERATORS))


def path_for(x: Tensor, operator: str = "ssd") -> str:
    """Name of the path that a call of an operator with `x` takes now."""
    forced = _forced.get() or os.environ.get("MLMAMBA_OPS")
    if forced:
        return _known(forced)
    return "cuda" if x.is_cuda and not _told(operator) else "torch"


@cache
def _told(operator: str) -> str:
    """`kernel_problem`, logged once for each process that computes on a GPU without the kernel."""
    if problem := kernel_problem(operator):
        logging.getLogger(__name__).warning("%s runs on the slower torch path: %s", operator, problem)
    return problem


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int = 64, **kwargs):
    """State-space recurrence on the chosen path; arguments and results as in `naive.ssd`."""
    path = path_for(x, "ssd")
    if path == "naive":
        return naive.ssd(x, dt, A, B, C, **kwargs)
    module = import_module("mlmamba.ops.cuda") if path == "cuda" else chunked
    return module.ssd(x, dt, A, B, C, chunk_size=chunk_size, **kwargs)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **kwargs):
    """Depthwise causal convolution and SiLU on the chosen path; arguments and results as in `naive.causal_conv1d`."""
    path = path_for(x, "causal_conv1d")
    module = import_module("mlmamba.ops.cuda") if path == "cuda" else naive if path == "naive" else convolution
    return module.causal_conv1d(x, weight, bias, **kwargs)


def _known(path: str) -> str:
    if path not in PATHS:
        raise ValueError(f"unknown operator path {path!r}; choose one of {', '.join(PATHS)}")
    return path
