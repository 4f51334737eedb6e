"""The CUDA path: the Triton kernels of mamba_ssm, and for the convolution the CUDA kernel of causal_conv1d or Triton
kernels of our own (triton_convolution.py), under the contract of naive.py.

A package is imported when a kernel of it is first asked for: `import mamba_ssm` loads Triton.
"""

import math
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mlmamba.ops import convolution
from mlmamba.ops.step import Between


@cache
def load_scan() -> Callable:
    """mamba_ssm's chunked scan. Raises whatever the import of the package raises where it does not fit.

    mamba_ssm 2.3.2 imports Mamba-1's extension, selective_scan_cuda, wherever it is imported. Mamba-2 never calls it,
    and it is not built (cluster/kernels.sh), so an empty module stands in its place.
    """
    if find_spec("mamba_ssm") and "selective_scan_cuda" not in sys.modules and not find_spec("selective_scan_cuda"):
        sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined


@cache
def load_convolution() -> Callable:
    """causal_conv1d's convolution. Raises whatever the import of the package raises where it does not fit."""
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn


@cache
def load_triton_convolution() -> Callable:
    """Our own convolution. Raises ImportError where torch came without Triton."""
    from mlmamba.ops.triton_convolution import causal_conv1d

    return causal_conv1d


@cache
def load_block() -> Callable:
    """mamba_ssm's convolution, scan and gated norm as one function, which calls causal_conv1d's extension."""
    load_convolution()
    load_scan()
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    return mamba_split_conv1d_scan_combined


@cache
def load_step() -> tuple[Callable, Callable, Callable]:
    """What a decoding step runs between its products: the convolution's update (causal_conv1d's, or our own in Triton),
    mamba_ssm's update of the state, and its gated norm."""
    load_scan()
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    if loads("causal_conv1d"):
        from mlmamba.ops.triton_convolution import causal_conv1d_update
    else:
        from causal_conv1d import causal_conv1d_update
    return causal_conv1d_update, selective_state_update, rmsnorm_fn


@cache
def load_norm() -> Callable:
    """mamba_ssm's sum and norm in one kernel."""
    load_scan()
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn

    return layer_norm_fn


LOADERS = {
    "step": load_step,
    "norm": load_norm,
    "mamba_ssm": load_scan,
    "block": load_block,
    "causal_conv1d": load_convolution,
    "triton_convolution": load_triton_convolution,
}
"""What loads a kernel, by the names of `mlmamba.ops.KERNELS`; and the fused block."""


@cache
def loads(kernel: str) -> str:
    """Why a kernel of LOADERS does not load, or "" when it does: tried once."""
    try:
        LOADERS[kernel]()
    except Exception as error:  # an extension of another torch fails in more ways than ImportError
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return ""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 256,
    final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Same contract as `mlmamba.ops.ssd`. The kernel gives the initial state to sequence 0: each row counts from 0."""
    out = load_scan()(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=chunk_size,
        D=D,
        initial_states=initial_state,
        seq_idx=None if seq_idx is None else (seq_idx - seq_idx[:, :1]).to(torch.int32),
        return_final_states=final_state,
    )
    return out if final_state else (out, None)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `naive.causal_conv1d`.

    causal_conv1d takes either boundaries or an initial state, and channels in multiples of 8; our own kernels take the
    other cases up to four taps, and the torch path what is left.
    """
    w = weight.shape[1]
    fits = w <= 4 and not x.shape[2] % 8 and (seq_idx is None or initial_state is None)
    if not (fits and not loads("causal_conv1d")):
        own = 2 <= w <= 4 and x.dtype != torch.float64 and not loads("triton_convolution")
        convolve = load_triton_convolution() if own else convolution.causal_conv1d
        return convolve(x, weight, bias, initial_state, seq_idx)
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8 or x.storage_offset() % 8:
        # A slice of a projection need not be aligned as the kernel wants it. `contiguous` would keep the odd strides of
        # a single row or token.
        x = x.clone(memory_format=torch.contiguous_format)
    y = load_convolution()(
        x.transpose(1, 2),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        seq_idx=None if seq_idx is None else seq_idx.to(torch.int32).contiguous(),
        initial_states=None if initial_state is None else initial_state.to(x.dtype).transpose(1, 2),
        activation="silu",
    )
    history = x.new_zeros(x.shape[0], w - 1, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    return y.transpose(1, 2), convolution.last_inputs(x, history, seq_idx)


def block(
    zxBCdt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    groups: int,
    chunk_size: int,
    dt_limit: tuple[float, float],
    seq_idx: Tensor | None,
    final_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Same contract as `mlmamba.ops.block`."""
    channels, inner = len(weight), len(norm_weight)
    out = load_block()(
        zxBCdt,
        weight.to(zxBCdt.dtype),
        None if bias is None else bias.to(zxBCdt.dtype),
        dt_bias,
        A,
        D,
        chunk_size,
        seq_idx=None if seq_idx is None else seq_idx.to(torch.int32).contiguous(),
        dt_limit=dt_limit,
        return_final_states=final_state,
        rmsnorm_weight=norm_weight,
        rmsnorm_eps=eps,
        headdim=inner // len(A),
        ngroups=groups,
        norm_before_gate=False,
    )
    if not final_state:
        return out, None, None
    y, state = out
    xBC = zxBCdt[..., inner : inner + channels]
    history = xBC.new_zeros(len(xBC), weight.shape[1] - 1, channels)
    return y, convolution.last_inputs(xBC, history, seq_idx), state


def step_problem(own: Between) -> str:
    """Why a mixer's decoding step cannot run in `between`, or ""."""
    if own.dt_limit != (0.0, math.inf):
        return f"the kernel knows no time_step_limit of {own.dt_limit}"
    if not 2 <= len(own.taps) <= 4:
        return f"the kernels take 2 to 4 taps, the convolution has {len(own.taps)}"
    return ""


def between(own: Between, zxBCdt: Tensor, conv: Tensor, ssm: Tensor, slots: Tensor | None) -> Tensor:
    """Same contract as `step.Between`, in three kernels; without `slots` too."""
    convolve, advance, norm = load_step()
    (inner, channels, heads), (_, _, p, n) = own.sizes, ssm.shape
    z, xBC, dt = zxBCdt.split([inner, channels, heads], -1)
    if slots is None:
        conv, ssm = conv[: len(z)], ssm[: len(z)]
    bias = own.bias.to(xBC.dtype)
    out = convolve(
        xBC, conv.transpose(1, 2), own.taps.t().to(xBC.dtype), bias, activation="silu", conv_state_indices=slots
    )
    x, B, C = out.split([inner, own.groups * n, own.groups * n], -1)
    y = advance(
        ssm,
        x.unflatten(-1, (heads, p)),
        dt[..., None].expand(-1, -1, p),
        own.A[:, None, None].expand(-1, p, n),
        *(t.unflatten(-1, (own.groups, n)) for t in (B, C)),
        D=own.D[:, None].expand(-1, p),
        dt_bias=own.dt_bias[:, None].expand(-1, p),
        dt_softplus=True,
        state_batch_indices=slots,
    )
    size = inner // own.norm_groups
    y = y.reshape(len(y), inner)
    return norm(y, own.weight, None, z=z, eps=own.eps, group_size=size, norm_before_gate=False)


def add_norm(y: Tensor, stream: Tensor | None, weight: Tensor, eps: float, wide: bool) -> tuple[Tensor, Tensor]:
    """Same contract as `step.add_norm`, in one kernel."""
    return load_norm()(y, weight, None, residual=stream, eps=eps, prenorm=True, residual_in_fp32=wide, is_rms_norm=True)
