"""Short depthwise causal convolution with SiLU, in plain torch on any device. Shapes are those of naive.py."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `naive.causal_conv1d`."""
    b, length, d = x.shape
    w = weight.shape[1]
    history = x.new_zeros(b, w - 1, d) if initial_state is None else initial_state.to(x.dtype)
    padded = torch.cat([history, x], dim=1)
    weight = weight.to(x.dtype)
    owner = None if seq_idx is None else torch.cat([seq_idx[:, :1].expand(b, w - 1), seq_idx], dim=1)
    y = x * weight[:, -1]
    for k in range(w - 1):
        shifted = padded[:, k : k + length]
        if owner is not None:
            shifted = shifted * (owner[:, k : k + length] == seq_idx)[..., None]
        y = torch.addcmul(y, shifted, weight[:, k])
    if bias is not None:
        y = y + bias.to(x.dtype)
    tail = padded[:, length:]
    if owner is not None:
        tail = tail * (owner[:, length:] == owner[:, -1:])[..., None]
    return F.silu(y), tail


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position of the convolution: x (b, d), state (b, w-1, d)."""
    window = torch.cat([state.to(x.dtype), x[:, None]], dim=1)
    y = (window * weight.to(x.dtype).T).sum(1)
    if bias is not None:
        y = y + bias.to(x.dtype)
    return F.silu(y), window[:, 1:]
