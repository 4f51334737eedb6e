"""Operators of Mamba-2 and the one place that chooses how they run.

Three paths compute the same thing: `naive` (the recurrence, for tests), `torch` (chunked, any device) and `cuda`
(mamba_ssm, and causal_conv1d or our own Triton kernels). `path_for` picks cuda for an operator when the tensor is on a
CUDA device and a kernel of the operator imports, else torch. `force_path("torch")`, as a context manager, overrides the
choice for everything inside it; the environment variable MLMAMBA_OPS does so for a whole process.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from mlmamba.ops import chunked, convolution, naive, step
from mlmamba.ops.chunked import ssd_step
from mlmamba.ops.convolution import causal_conv1d_step
from mlmamba.ops.step import Between

PATHS = ("naive", "torch", "cuda")
__all__ = [
    "KERNELS",
    "OPERATORS",
    "PATHS",
    "WORTH_COMPILING",
    "Between",
    "add_norm",
    "between",
    "block",
    "causal_conv1d",
    "causal_conv1d_step",
    "device_problem",
    "force_path",
    "fuses",
    "fuses_norm",
    "has_kernels",
    "kernel",
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
"""The operators that have a CUDA kernel, and the package that the first choice comes from."""
KERNELS = {"ssd": ("mamba_ssm",), "causal_conv1d": ("causal_conv1d", "triton_convolution")}
"""The kernels of each operator, best first: `triton_convolution` is ours and needs Triton alone."""
WORTH_COMPILING = 2**18
"""Bytes of one row's recurrent state in one mixer from which a CPU's decoding is worth compiling: 130m has 786,432."""
OLDEST = (7, 0)
"""Compute capability that Triton's compiler asks for."""


@cache
def kernel_problem(operator: str) -> str:
    """Why the first choice of an operator's kernels cannot be used, or "" when its package imports.

    A package that was built for another torch is found and does not import, so it is imported, once.
    """
    problem = import_module("mlmamba.ops.cuda").loads(OPERATORS[operator])
    return problem and f"{OPERATORS[operator]} does not import: {problem}"


def kernel(operator: str) -> str:
    """Name of the kernel, of KERNELS, that an operator has on a CUDA device; "" where it runs on the torch path."""
    loads = import_module("mlmamba.ops.cuda").loads
    return next((name for name in KERNELS[operator] if not loads(name)), "")


def has_kernels() -> bool:
    """Whether every operator has a kernel (not whether there is a GPU)."""
    return all(map(kernel, OPERATORS))


def device_problem(index: int = 0) -> str:
    """Why no kernel can run on a CUDA device, or "" when they can."""
    if not torch.cuda.is_available():
        return ""
    found = torch.cuda.get_device_capability(index)
    if found >= OLDEST:
        return ""
    name, (major, minor) = torch.cuda.get_device_name(index), OLDEST
    return f"{name} has compute capability {found[0]}.{found[1]}; Triton asks for {major}.{minor} or newer"


def path_for(x: Tensor, operator: str = "ssd") -> str:
    """Name of the path that a call of an operator with `x` takes now."""
    forced = _forced.get() or os.environ.get("MLMAMBA_OPS")
    if forced:
        return _known(forced)
    return "cuda" if x.is_cuda and _told(operator, x.device.index or 0) else "torch"


@cache
def _told(operator: str, device: int) -> bool:
    """Whether an operator has a kernel on a device. What runs in place of the first choice, and why, is logged once."""
    runs, problem = kernel(operator), kernel_problem(operator)
    if old := device_problem(device):
        runs, problem = "", old
    log = logging.getLogger(__name__)
    if not runs:
        log.warning("%s runs on the slower torch path: %s", operator, problem)
    elif problem:
        # Not to have installed a package is a choice; one that is there and broken is not.
        broken = find_spec(OPERATORS[operator]) is not None
        log.log(logging.WARNING if broken else logging.INFO, "%s runs on %s: %s", operator, runs, problem)
    return bool(runs)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int = 64, final_state: bool = True, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """State-space recurrence on the chosen path; arguments and results as in `naive.ssd`.

    Args:
        final_state: False for None in place of the final state, which spares the kernel writing it.
    """
    path = path_for(x, "ssd")
    if path == "cuda":
        cuda = import_module("mlmamba.ops.cuda")
        return cuda.ssd(x, dt, A, B, C, chunk_size=chunk_size, final_state=final_state, **kwargs)
    y, state = (
        naive.ssd(x, dt, A, B, C, **kwargs)
        if path == "naive"
        else chunked.ssd(x, dt, A, B, C, chunk_size=chunk_size, **kwargs)
    )
    return y, state if final_state else None


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **kwargs):
    """Depthwise causal convolution and SiLU on the chosen path; arguments and results as in `naive.causal_conv1d`."""
    path = path_for(x, "causal_conv1d")
    module = import_module("mlmamba.ops.cuda") if path == "cuda" else naive if path == "naive" else convolution
    return module.causal_conv1d(x, weight, bias, **kwargs)


def fuses(x: Tensor, channels: int, taps: int) -> bool:
    """Whether `block` can be called for x (b, l, ...): both operators have their first choice of kernels, and they take
    that many channels and taps. A single token keeps odd strides, which the convolution refuses."""
    if x.shape[1] < 2 or channels % 8 or not 2 <= taps <= 4:
        return False
    if any(path_for(x, operator) != "cuda" for operator in OPERATORS):
        return False
    return not import_module("mlmamba.ops.cuda").loads("block")


def block(
    zxBCdt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    groups: int,
    chunk_size: int,
    dt_limit: tuple[float, float],
    seq_idx: Tensor | None = None,
    final_state: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Convolution, recurrence and gated norm of a Mamba-2 block in one function, from a zero state; ask `fuses` first.

    It keeps its input alone for the backward pass, in place of what each step would keep, and computes the convolution
    again. Shapes: e inner width, d = e + 2gn.

    Args:
        zxBCdt: (b, l, e + d + h), what in_proj gives.
        weight, bias: (d, w) and (d,) or None, of the convolution.
        dt_bias, A, D: (h,) float32.
        norm_weight: (e,).
        dt_limit: bounds of the step sizes after softplus.
        seq_idx: (b, l) integers as in `naive.ssd`, or None.
        final_state: False for None in place of both states.

    Returns:
        y (b, l, e), the last inputs of the convolution (b, w-1, d), and the final state (b, h, p, n) in float32.
    """
    kernels = import_module("mlmamba.ops.cuda")
    rest = (eps, groups, chunk_size, dt_limit, seq_idx, final_state)
    return kernels.block(zxBCdt, weight, bias, dt_bias, A, D, norm_weight, *rest)


def between(mixer, make: bool, always: bool = False) -> tuple[Between, str]:
    """The part of a decoding step between a `Mamba2Mixer`'s projections, made ready, and how it runs.

    Args:
        mixer: on its device; its weights must not change from now on.
        make: compile code for the processor where there is none yet; False to use only what is there.
        always: also for states that are small.

    Returns:
        `Between`, and "kernels", "compiled", or "torch" with the reason.
    """
    own = Between.of(mixer)
    if path_for(mixer.A_log, "ssd") == "cuda":
        cuda = import_module("mlmamba.ops.cuda")
        problem = cuda.loads("step") or cuda.step_problem(own)
        if not problem:
            own.kernels, own.taps = cuda.between, own.taps.t().contiguous().t()  # a channel's taps side by side
        return own, f"torch: {problem}" if problem else "kernels"
    if mixer.A_log.device.type != "cpu":
        return own, "torch: no kernels for this device"
    if own.bytes < WORTH_COMPILING and not always:
        return own, "torch: the states are small"
    compiled = import_module("mlmamba.ops.compiled")
    if own.taps.dtype not in compiled.DTYPES:
        return own, f"torch: nothing is compiled for {str(own.taps.dtype).removeprefix('torch.')}"
    try:
        own.compiled = compiled.operators(make).block
    except compiled.NotCompiled as problem:
        return own, f"torch: {problem}"
    return own, "compiled"


def add_norm(y: Tensor, stream: Tensor | None, weight: Tensor, eps: float, wide: bool) -> tuple[Tensor, Tensor]:
    """Sum and norm on the chosen path, in one kernel where `fuses_norm`; arguments and results as in
    `step.add_norm`."""
    return (import_module("mlmamba.ops.cuda") if fuses_norm(y) else step).add_norm(y, stream, weight, eps, wide)


def fuses_norm(x: Tensor) -> bool:
    """Whether `add_norm` is one kernel for x (..., d)."""
    return path_for(x, "ssd") == "cuda" and not import_module("mlmamba.ops.cuda").loads("norm")


def _known(path: str) -> str:
    if path not in PATHS:
        raise ValueError(f"unknown operator path {path!r}; choose one of {', '.join(PATHS)}")
    return path
