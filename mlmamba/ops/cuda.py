"""The CUDA path: the Triton kernels of mamba_ssm and the CUDA kernel of causal_conv1d, under the contract of naive.py.

The packages are imported when a kernel is first asked for: `import mamba_ssm` loads Triton.
"""

import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mlmamba.ops import convolution


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


LOADERS = {"ssd": load_scan, "causal_conv1d": load_convolution}


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
) -> tuple[Tensor, Tensor]:
    """Same contract as `naive.ssd`. The kernel gives the initial state to sequence 0, so each row counts from 0."""
    return load_scan()(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=chunk_size,
        D=D,
        initial_states=initial_state,
        seq_idx=None if seq_idx is None else (seq_idx - seq_idx[:, :1]).to(torch.int32),
        return_final_states=True,
    )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `naive.causal_conv1d`.

    The kernel takes either boundaries or an initial state, up to four taps and channels in multiples of 8; the torch
    path serves the other cases.
    """
    if (seq_idx is not None and initial_state is not None) or x.shape[2] % 8 or weight.shape[1] > 4:
        return convolution.causal_conv1d(x, weight, bias, initial_state, seq_idx)
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
    w = weight.shape[1]
    history = x.new_zeros(x.shape[0], w - 1, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    tail = torch.cat([history, x[:, -(w - 1) :]], dim=1)[:, -(w - 1) :]
    if seq_idx is not None:
        owner = torch.cat([seq_idx[:, :1].expand(-1, w - 1), seq_idx[:, -(w - 1) :]], dim=1)[:, -(w - 1) :]
        tail = tail * (owner == seq_idx[:, -1:])[..., None]
    return y.transpose(1, 2), tail
