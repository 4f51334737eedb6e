"""State-space duality over chunks, in plain torch on any device, with its gradient written out.

Inside a chunk the recurrence is a masked matrix product, between chunks a short recurrence over chunk states
(Dao and Gu 2024, arXiv 2405.21060, section 6). Cost is linear in the length. Shapes are those of naive.py; inside, c is
the number of chunks and q the chunk length, and heads stay beside the features, (b, c, q, h, p): all heads of a group
share B and C, so the products with the state are one large matrix product per chunk and group and copy nothing.

With L the running sum of dt A inside a chunk and E_k the state entering chunk k, stored as (n, h p):

    y_i     = sum_{j<=i} (C_i . B_j) exp(L_i - L_j) dt_j x_j  +  exp(L_i) C_i E_k  +  D x_i
    E_{k+1} = exp(L_end) E_k + sum_j B_j exp(L_end - L_j) dt_j x_j

The gradient keeps the entering states and recomputes everything of size q x q, so training holds no decay matrices.
Each term above decays from one position to another, and its product with its own gradient belongs to dt A of every
position between the two. Terms that do not decay (j = i) are left out of those sums rather than cancelled in them: with
strong decay the rest is smaller than their rounding.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Longest chunk on a CPU. The work on the decay matrix grows with the chunk, that on the states shrinks.
CPU_CHUNK = 64

# From this size on, a row's state is updated and read before the next row's: it then comes from memory only once. (A
# smaller one is not worth the calls.)
ROW_BYTES = 2**19


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
    """Same contract as `naive.ssd`; `chunk_size` (on a CPU at most CPU_CHUNK) changes speed and rounding only.

    Runs in float32 (float64 for float64 input) also under autocast. Differentiable once.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    q = min(chunk_size, length, CPU_CHUNK if x.device.type == "cpu" else chunk_size)
    pad = -length % q
    if pad and seq_idx is not None:  # padding has dt 0, so it changes no state; it continues the last sequence
        seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], dim=1)
    skip = x.new_zeros(h) if D is None else D
    if initial_state is None:
        state = x.new_zeros(b, g, n, h // g * p, dtype=dtype)
    else:
        state = initial_state.to(dtype).reshape(b, g, h // g * p, n).transpose(2, 3)
    with torch.autocast(x.device.type, enabled=False):
        y, state = _SSD.apply(
            _chunks(x.to(dtype), q, pad),
            _chunks(dt.to(dtype), q, pad),
            A.to(dtype),
            _chunks(B.to(dtype), q, pad).transpose(2, 3),  # (b, c, g, q, n)
            _chunks(C.to(dtype), q, pad).transpose(2, 3),
            skip.to(dtype),
            state,
            None if seq_idx is None else seq_idx.unflatten(1, (-1, q)),
        )
    return y.flatten(1, 2)[:, :length].to(x.dtype), state.transpose(2, 3).contiguous().view(b, h, p, n)


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """One position of the recurrence, for decoding: x (b, h, p), dt (b, h), B and C (b, g, n), state (b, h, p, n).

    With `in_place` the new state may be written over the old one, which halves the time where states are large.
    """
    b, h, p = x.shape
    g, n = B.shape[1:]
    work = state.dtype
    xf, dtf = x.to(work), dt.to(work)
    decay = torch.exp(dtf * A.to(work))[..., None, None]
    added = (dtf[..., None] * xf).reshape(b, g, -1, 1)
    parts = (added, B.to(work)[:, :, None], C.to(work).reshape(b, g, n, 1))
    if in_place and b > 1 and state.device.type == "cpu" and state[0].nbytes >= ROW_BYTES:
        rows = zip(*(t.split(1) for t in (state, decay, *parts)), strict=True)
        y = torch.cat([_advance(row.mul_(factor), *own) for row, factor, *own in rows])
    else:
        state = state.mul_(decay) if in_place else state * decay
        y = _advance(state, *parts)
    y = y.view(b, h, p)
    if D is not None:
        y = torch.addcmul(y, xf, D.to(work)[:, None])
    return y.to(x.dtype), state


def _advance(state: Tensor, added: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Add one position to the decayed state (b, h, p, n), in place, and read it: (b, g, h/g p, 1)."""
    b, g = B.shape[:2]
    grouped = state.view(b, g, -1, state.shape[-1]).addcmul_(added, B)
    return grouped @ C


class _Decays:
    """Everything that follows from dt, A and the boundaries; all of size (b, c, q, h) or smaller.

    A boundary cuts four routes: within a chunk (`allowed`), from the entering state (`from_start`), to the leaving
    state (`to_end`), from the entering to the leaving state (`keep`).
    """

    def __init__(self, dt: Tensor, A: Tensor, seq_idx: Tensor | None):
        q = dt.shape[2]
        self.log = torch.cumsum(dt * A, dim=2)
        end = self.log[:, :, -1:]
        self.from_start = self.log.exp()
        self.to_end = (end - self.log).exp()
        self.keep = end[:, :, 0].exp()  # (b, c, h)
        self.allowed = torch.ones(q, q, dtype=torch.bool, device=dt.device).tril()
        if seq_idx is not None:
            last = seq_idx[:, :, -1]
            before = torch.cat([seq_idx[:, :1, 0], last[:, :-1]], dim=1)
            self.allowed = self.allowed & (seq_idx[..., :, None] == seq_idx[..., None, :])[:, :, None]
            self.from_start = self.from_start * (seq_idx == before[..., None])[..., None]
            self.to_end = self.to_end * (seq_idx == last[..., None])[..., None]
            self.keep = self.keep * (last == before)[..., None]

    def within(self) -> Tensor:
        """exp(L_i - L_j) as (b, c, h, q, q), 1 above the diagonal, where L_i > L_j could overflow."""
        log = self.log.transpose(2, 3).contiguous()
        return (log[..., :, None] - log[..., None, :]).tril_().exp_()

    def keep_for(self, states: Tensor) -> Tensor:
        """`keep` as (b, c, g, 1, h/g, 1), to multiply states (b, c, g, n, h/g, p)."""
        b, c, g, _, heads, _ = states.shape
        return self.keep.view(b, c, g, 1, heads, 1)


class _SSD(torch.autograd.Function):
    """x (b,c,q,h,p), dt (b,c,q,h), A (h,), B and C (b,c,g,q,n), D (h,), state (b,g,n,h/g p), seq_idx (b,c,q) or None.

    Returns y like x and the final state.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, seq_idx):
        b, c, _, h, p = x.shape
        g, n = B.shape[2], B.shape[4]
        decays = _Decays(dt, A, seq_idx)
        scaled = x * dt[..., None]
        mixing = _mixing(decays, (C @ B.transpose(3, 4)).masked_fill_(~decays.allowed, 0.0))

        added = B.transpose(3, 4) @ _by_group(scaled * decays.to_end[..., None], g)
        added = added.view(b, c, g, n, h // g, p)
        keep = decays.keep_for(added)
        entering = torch.empty_like(added)
        state = state.reshape(b, g, n, h // g, p)
        for k in range(c):
            entering[:, k] = state
            state = torch.addcmul(added[:, k], keep[:, k], state)

        from_state = _by_position(C @ entering.flatten(4), h) * decays.from_start[..., None]
        y = torch.addcmul((mixing @ scaled.transpose(2, 3)).transpose(2, 3), x, D[:, None])
        y += from_state
        ctx.save_for_backward(x, dt, A, B, C, D, from_state, entering, seq_idx)
        return y, state.flatten(3)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, dt, A, B, C, D, from_state, entering, seq_idx = ctx.saved_tensors
        c, h, g = x.shape[1], x.shape[3], B.shape[2]
        decays = _Decays(dt, A, seq_idx)
        dy = dy.contiguous()
        rows = (dy * from_state).sum(-1)

        # Between chunks, from the last to the first: `leaving` is the gradient of the state that leaves each chunk.
        dy_start = _by_group(dy * decays.from_start[..., None], g)
        into = (C.transpose(3, 4) @ dy_start).view_as(entering)
        keep = decays.keep_for(entering)
        leaving, through = torch.empty_like(entering), torch.empty_like(decays.keep)
        dstate = dstate.reshape_as(entering[:, 0])
        for k in reversed(range(c)):
            leaving[:, k] = dstate
            through[:, k] = (dstate * entering[:, k]).sum((2, 4)).flatten(1) * decays.keep[:, k]
            dstate = torch.addcmul(into[:, k], keep[:, k], dstate)
        leaving, entering = leaving.flatten(4), entering.flatten(4)

        scaled = x * dt[..., None]
        scaled_end = scaled * decays.to_end[..., None]
        dscaled = _by_position(B @ leaving, h)
        ends = (dscaled * scaled_end).sum(-1)
        dscaled *= decays.to_end[..., None]

        # Within chunks.
        scores = (C @ B.transpose(3, 4)).masked_fill_(~decays.allowed, 0.0)
        within = decays.within()
        dmixing = dy.transpose(2, 3) @ scaled.permute(0, 1, 3, 4, 2)
        dscores = (dmixing * within).unflatten(2, (g, h // g)).sum(3).masked_fill_(~decays.allowed, 0.0)
        mixing = within.unflatten(2, (g, h // g)).mul_(scores[:, :, :, None]).flatten(2, 3)
        dscaled += (mixing.transpose(3, 4) @ dy.transpose(2, 3)).transpose(2, 3)
        decayed = dmixing.mul_(mixing).tril_(-1)
        rows += (decayed.sum(4) - decayed.sum(3)).transpose(2, 3)

        dB = _by_group(scaled_end, g) @ leaving.transpose(3, 4) + dscores.transpose(3, 4) @ C
        dC = dy_start @ entering.transpose(3, 4) + dscores @ B
        # Gradient of dt A: what ends here or later and began before, what leaves the chunk and began before here, and
        # what passes the whole chunk.
        drate = rows.flip(2).cumsum(2).flip(2) + (ends.cumsum(2) - ends) + through[:, :, None]
        ddt = torch.addcmul((dscaled * x).sum(-1), drate, A)
        dD = (dy * x).sum((0, 1, 2, 4))
        dx = torch.addcmul(dscaled.mul_(dt[..., None]), dy, D[:, None])
        return dx, ddt, (drate * dt).sum((0, 1, 2)), dB, dC, dD, dstate.flatten(3), None


def _mixing(decays: _Decays, scores: Tensor) -> Tensor:
    """(C_i . B_j) exp(L_i - L_j) as (b, c, h, q, q), from scores (b, c, g, q, q)."""
    within = decays.within()
    g = scores.shape[2]
    return within.unflatten(2, (g, -1)).mul_(scores[:, :, :, None]).flatten(2, 3)


def _chunks(t: Tensor, q: int, pad: int) -> Tensor:
    """(b, l, ...) -> (b, c, q, ...), padded with zeros."""
    if pad:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad))
    return t.unflatten(1, (-1, q))


def _by_group(t: Tensor, g: int) -> Tensor:
    """(b, c, q, h, p) -> (b, c, g, q, h/g p); no copy for one group."""
    return t.unflatten(3, (g, -1)).flatten(4).transpose(2, 3)


def _by_position(t: Tensor, h: int) -> Tensor:
    """(b, c, g, q, h/g p) -> (b, c, q, h, p), the inverse of `_by_group`."""
    return t.transpose(2, 3).flatten(3).unflatten(3, (h, -1))
