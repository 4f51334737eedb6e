"""The torch path: state-space duality over chunks and the short convolution as shifted products. Any device.

Inside a chunk the recurrence is a masked matrix product, between chunks a short recurrence over chunk states
(Dao and Gu 2024, arXiv 2405.21060, section 6). Cost is linear in the length. The decay matrix of a chunk holds
h * chunk values per position, so on a CPU few wide heads and a short chunk are fastest. Shapes are those of naive.py;
inside, c is the number of chunks and q the chunk length.
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
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Same contract as `naive.ssd`; `chunk_size` changes speed and rounding only."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    q = min(chunk_size, length)
    pad = -length % q
    c = (length + pad) // q

    # (b, c, heads or groups, q, features), so that every product below is a batched matrix product.
    X = _chunk(x, c, q, pad).to(dtype)
    Bc, Cc = (_chunk(t, c, q, pad).to(dtype) for t in (B, C))
    dtc = _chunk(dt.to(dtype)[..., None], c, q, pad)[..., 0]
    log_decay = torch.cumsum(dtc * A.to(dtype)[:, None], dim=-1)  # (b, c, h, q), from the chunk's start
    total = log_decay[..., -1]  # (b, c, h)
    same_chunk, same_start, same_end, carried = _boundaries(seq_idx, c, q, pad)

    # 1. Within chunks: y_i = sum_{j<=i} (C_i . B_j) exp(log_decay_i - log_decay_j) dt_j x_j.
    allowed = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    if same_chunk is not None:
        allowed = allowed & same_chunk
    decay = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~allowed, float("-inf")).exp()
    scores = Cc @ Bc.transpose(-1, -2)  # (b, c, g, q, q)
    mixing = decay.unflatten(2, (g, h // g)) * scores[:, :, :, None]
    dtX = dtc[..., None] * X
    y = mixing.flatten(2, 3) @ dtX

    # 2. What each chunk adds to the state at its end.
    to_end = (total[..., None] - log_decay).exp()
    if same_end is not None:
        to_end = to_end * same_end
    added = (dtX * to_end[..., None]).transpose(-1, -2).unflatten(2, (g, h // g)) @ Bc[:, :, :, None]
    added = added.flatten(2, 3)  # (b, c, h, p, n)

    # 3. Between chunks.
    keep = total.exp()
    if carried is not None:
        keep = keep * carried
    state = x.new_zeros(b, h, p, n, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    entering = []
    for k in range(c):
        entering.append(state)
        state = keep[:, k, :, None, None] * state + added[:, k]
    entering = torch.stack(entering, dim=1)

    # 4. What the entering state adds to each position.
    from_start = log_decay.exp()
    if same_start is not None:
        from_start = from_start * same_start
    read = Cc[:, :, :, None] @ entering.unflatten(2, (g, h // g)).transpose(-1, -2)
    y = y + read.flatten(2, 3) * from_start[..., None]

    if D is not None:
        y = y + D.to(dtype)[:, None, None] * X
    y = y.permute(0, 1, 3, 2, 4).reshape(b, c * q, h, p)[:, :length]
    return y.to(x.dtype), state


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


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One position of the recurrence, for decoding: x (b, h, p), dt (b, h), B and C (b, g, n), state (b, h, p, n)."""
    h, g = x.shape[1], B.shape[1]
    work = state.dtype
    xf, dtf = x.to(work), dt.to(work)
    Bh, Ch = (t.to(work).repeat_interleave(h // g, dim=1) for t in (B, C))
    decay = torch.exp(dtf * A.to(work))[..., None, None]
    state = decay * state + (dtf[..., None] * xf)[..., None] * Bh[:, :, None]
    y = (state @ Ch[..., None])[..., 0]
    if D is not None:
        y = y + D.to(work)[:, None] * xf
    return y.to(x.dtype), state


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position of the convolution: x (b, d), state (b, w-1, d)."""
    window = torch.cat([state.to(x.dtype), x[:, None]], dim=1)
    y = (window * weight.to(x.dtype).T).sum(1)
    if bias is not None:
        y = y + bias.to(x.dtype)
    return F.silu(y), window[:, 1:]


def _chunk(t: Tensor, c: int, q: int, pad: int) -> Tensor:
    """(b, l, heads, features) -> (b, c, heads, q, features). Padding has dt 0, so it changes no state."""
    if pad:
        t = F.pad(t, (0, 0, 0, 0, 0, pad))
    return t.unflatten(1, (c, q)).transpose(2, 3)


def _boundaries(seq_idx: Tensor | None, c: int, q: int, pad: int) -> tuple[Tensor | None, ...]:
    """Masks that cut the four routes between positions of different sequences, all broadcastable over heads.

    Returns (within the chunk (b,c,1,q,q), from the entering state (b,c,1,q), to the leaving state (b,c,1,q),
    from the entering to the leaving state (b,c,1)). Padding continues the last sequence.
    """
    if seq_idx is None:
        return None, None, None, None
    if pad:
        seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], dim=1)
    s = seq_idx.unflatten(1, (c, q))
    last = s[..., -1]
    before = torch.cat([seq_idx[:, :1], last[:, :-1]], dim=1)
    within = (s[..., :, None] == s[..., None, :])[:, :, None]
    return within, (s == before[..., None])[:, :, None], (s == last[..., None])[:, :, None], (last == before)[..., None]
