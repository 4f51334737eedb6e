"""The recurrences of Mamba-2, step by step: slow, and the truth that every other path is tested against.

Shapes (legend for the whole ops package): b batch, l length, h heads, p head dim, g groups (h % g == 0), n state size,
d channels, w kernel width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """State-space recurrence h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t.

    Source: Dao and Gu 2024 (arXiv 2405.21060), equation 1 with the scalar-times-identity A of section 6.

    Args:
        x: (b, l, h, p) inputs.
        dt: (b, l, h) step sizes, positive (softplus already applied); 0 leaves the state untouched.
        A: (h,) negative decay rates.
        B, C: (b, l, g, n).
        D: (h,) skip weights, or None.
        initial_state: (b, h, p, n), or None for zeros. It belongs to the sequence of the first position.
        seq_idx: (b, l) integers, or None. The state restarts from zero where the value changes; a value that was left
            must not come back in its row.

    Returns:
        y of shape (b, l, h, p) in x's dtype, and the final state (b, h, p, n) in float32 (float64 for float64 input).
    """
    out_dtype, x = x.dtype, _upcast(x)
    dt, A, B, C = (t.to(x.dtype) for t in (dt, A, B, C))
    b, length, h, p = x.shape
    B, C = (t.repeat_interleave(h // t.shape[2], dim=2) for t in (B, C))
    state = x.new_zeros(b, h, p, B.shape[-1]) if initial_state is None else initial_state.to(x.dtype)
    ys = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + D.to(x.dtype)[:, None] * x
    return y.to(out_dtype), state


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution followed by SiLU; position t sees t-w+1 .. t of its own sequence.

    Args:
        x: (b, l, d).
        weight: (d, w).
        bias: (d,) or None.
        initial_state: (b, w-1, d), the inputs just before x, or None for zeros.
        seq_idx: (b, l) integers or None; inputs of another sequence count as zero.

    Returns:
        y (b, l, d) and the last w-1 inputs (b, w-1, d), those of an earlier sequence zeroed; both in x's dtype.
    """
    out_dtype, x = x.dtype, _upcast(x)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    b, length, d = x.shape
    w = weight.shape[1]
    history = x.new_zeros(b, w - 1, d) if initial_state is None else initial_state.to(x.dtype)
    padded = torch.cat([history, x], dim=1)
    if seq_idx is None:
        seq_idx = x.new_zeros(b, length, dtype=torch.long)
    owner = torch.cat([seq_idx[:, :1].expand(b, w - 1), seq_idx], dim=1)
    ys = []
    for t in range(length):
        window = padded[:, t : t + w] * (owner[:, t : t + w] == owner[:, t + w - 1, None])[..., None]
        y = (window.transpose(1, 2) * weight).sum(-1)
        ys.append(y if bias is None else y + bias)
    tail = padded[:, length:] * (owner[:, length:] == owner[:, -1:])[..., None]
    return F.silu(torch.stack(ys, dim=1)).to(out_dtype), tail.to(out_dtype)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
