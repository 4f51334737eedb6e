"""The CUDA path: the Triton kernels of mamba_ssm and the CUDA kernel of causal_conv1d, under the contract of naive.py.

Imported only when a tensor is on a CUDA device and both packages are installed: `import mamba_ssm` loads Triton.
"""

import torch
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from mlmamba.ops import convolution


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
    return mamba_chunk_scan_combined(
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
        x = x.contiguous()  # a slice of a projection need not be aligned as the kernel wants it
    y = causal_conv1d_fn(
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
