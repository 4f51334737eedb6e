"""Attention and MLP of hybrid models: mixers with the same in_proj and out_proj as Mamba-2's, called in the same way.

Grouped heads (Ainslie et al. 2023), rotary positions (Su et al. 2021) or none, and one `in_proj` for queries, keys and
values, as in mamba_ssm's MHA. A sequence of a packed row sees itself alone, and its positions begin at 0. Padding is at
the end of a row (`Mamba2Backbone` sees to it), where causality hides it.
Shapes: b batch, l length, d model width, h heads, g groups of keys and values, p head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlmamba.ops.linear import Linear
from mlmamba.state import KeyValueState, resized

_FIRST_PLACES = 64  # of a state that grows: places for so many tokens, then twice as many each time


class Attention(nn.Module):
    """Causal self-attention with grouped heads."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.attention_head_dim
        width, bias = self.heads * self.head_dim, config.attention_bias
        self.scale = self.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.sizes = (width, self.groups * self.head_dim, self.groups * self.head_dim)
        every, keys = config.attention_in_multiplier, config.key_multiplier
        self.factors, self.out_factor = (every, every * keys, every), config.attention_out_multiplier
        self.in_proj = Linear(config.hidden_size, sum(self.sizes), bias=bias)
        self.out_proj = Linear(width, config.hidden_size, bias=bias)
        self.theta = config.rope_theta
        self.rotated = int(self.head_dim * config.partial_rotary_factor)
        self.limit = config.max_position_embeddings

    def forward(
        self,
        x: Tensor,
        state: KeyValueState | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, KeyValueState | None]:
        """(b, l, d) -> (b, l, d) and the state afterwards, or None.

        Args:
            mask: (b, l) bool, True and then False.
            seq_idx: (b, l) integers, numbered through from 0; a state belongs to the sequence 0.

        Raises:
            ValueError: a sequence gets longer than the model's `max_position_embeddings`.
        """
        length = x.shape[1]
        qkv = scaled(self.in_proj(x), self.sizes, self.factors).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.groups, self.groups], dim=1)
        if self.theta is not None:
            turns = angles(_positions(x, state, seq_idx), self.theta, self.rotated, q.dtype)
            q, k = rotate(q, *turns), rotate(k, *turns)
        if length == 1 and state is not None and mask is seq_idx is None:
            return self._step(q, k, v, state)
        if state is not None:
            k = torch.cat([state.keys[:, :, : state.longest].to(k), k], 2)
            v = torch.cat([state.values[:, :, : state.longest].to(v), v], 2)
        visible = _visible(length, state, seq_idx, x.device)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=self.scale, enable_gqa=self.heads > self.groups
        )
        y = times(self.out_proj(y.transpose(1, 2).flatten(2)), self.out_factor)
        return y, self._state_after(k, v, state, mask, seq_idx) if keep_state else None

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState) -> tuple[Tensor, KeyValueState]:
        """One token: its key and value are written behind those of each row, and all of the row's are read."""
        b, longest = len(q), state.longest + 1
        self._check(longest)
        keys, values, lengths = state.parts
        if keys.shape[2] < longest:
            room = min(max(2 * longest, _FIRST_PLACES), self.limit)
            keys, values = resized(keys, room), resized(values, room)
        elif not state.in_place:
            keys, values = keys.clone(), values.clone()
        rows = torch.arange(b, device=k.device)
        keys[rows, :, lengths] = k[:, :, 0].to(keys)
        values[rows, :, lengths] = v[:, :, 0].to(values)
        lengths = lengths.add_(1) if state.in_place else lengths + 1
        visible = None
        if b > 1:  # the only row is the longest
            visible = (torch.arange(longest, device=k.device) < lengths[:, None])[:, None, None]
        # The queries of a group stand as a sequence that sees the same keys: no key is repeated.
        q = q.reshape(b, self.groups, -1, self.head_dim)
        known = (t[:, :, :longest].to(q) for t in (keys, values))
        y = F.scaled_dot_product_attention(q, *known, attn_mask=visible, scale=self.scale)
        y = times(self.out_proj(y.reshape(b, 1, -1)), self.out_factor)
        return y, KeyValueState(keys, values, lengths, longest, state.in_place)

    def _state_after(self, k: Tensor, v: Tensor, state: KeyValueState | None, mask, seq_idx) -> KeyValueState:
        """Of k and v (b, g, m + l, p), m tokens of the state first: those of each row's last sequence, without gaps."""
        b, _, total, _ = k.shape
        if mask is None and seq_idx is None and (state is None or b == 1):
            self._check(total)
            return KeyValueState(k.contiguous(), v.contiguous(), torch.full((b,), total, device=k.device), total)
        fresh = mask
        if mask is None:
            fresh = torch.ones(b, total - (0 if state is None else state.longest), dtype=torch.bool, device=k.device)
        if seq_idx is not None:
            fresh = fresh & (seq_idx == seq_idx[:, -1:])
        kept = fresh
        if state is not None:
            old = torch.arange(state.longest, device=k.device) < state.lengths[:, None]
            if seq_idx is not None:
                old = old & (seq_idx[:, -1:] == 0)
            kept = torch.cat([old, fresh], 1)
        lengths = kept.sum(1)
        longest = int(lengths.max())
        self._check(longest)
        order = torch.argsort(kept.int(), dim=1, descending=True, stable=True)[:, None, :longest, None]
        order = order.expand(-1, self.groups, -1, self.head_dim)
        return KeyValueState(k.gather(2, order), v.gather(2, order), lengths, longest)

    def _check(self, longest: int) -> None:
        if longest > self.limit:
            raise ValueError(
                f"a sequence of {longest:,} tokens is over the {self.limit:,} for which attention has room "
                "(text_config.max_position_embeddings)"
            )


class MLP(nn.Module):
    """MLP: silu of one half of in_proj times the other (Shazeer 2020, SwiGLU), or the square of relu of it."""

    def __init__(self, config):
        super().__init__()
        self.gated, self.size = config.mlp_activation == "swiglu", config.mlp_size
        self.in_proj = Linear(config.hidden_size, (1 + self.gated) * self.size, bias=config.mlp_bias)
        self.out_proj = Linear(self.size, config.hidden_size, bias=config.mlp_bias)
        self.factor, self.out_factor = config.mlp_multipliers or (1.0, 1.0)

    def forward(self, x: Tensor, state=None, mask=None, seq_idx=None, keep_state: bool = True):
        """(b, l, d) -> (b, l, d), and None: it remembers nothing."""
        if not self.gated:
            return self.out_proj(F.relu(self.in_proj(x)).square()), None
        gate, up = self.in_proj(x).chunk(2, dim=-1)
        return times(self.out_proj(F.silu(times(gate, self.factor)) * up), self.out_factor), None


def times(y: Tensor, factor: float) -> Tensor:
    """y times a factor; y itself where that is 1."""
    return y if factor == 1 else y * factor


def scaled(y: Tensor, sizes: Sequence[int], factors: Sequence[float]) -> Tensor:
    """The parts of y (..., sum of sizes), each times its factor; y itself where all are 1."""
    if all(factor == 1 for factor in factors):
        return y
    return torch.cat([times(part, factor) for part, factor in zip(y.split(sizes, -1), factors, strict=True)], -1)


def angles(positions: Tensor, theta: float, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (b, 1, l, width/2) at positions (b, l): pair i turns by theta ** (-2i / width) each."""
    rates = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    turned = positions[:, None, :, None].float() * rates
    return turned.cos().to(dtype), turned.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b, h, l, p) with pairs (i, i + width/2) of its first `width` channels turned; the others stay."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _positions(x: Tensor, state: KeyValueState | None, seq_idx: Tensor | None) -> Tensor:
    """Position of each token in its sequence: (b, l), or (1, l) where all rows have the same."""
    places = torch.arange(x.shape[1], device=x.device)[None]
    before = 0 if state is None else state.lengths[:, None]
    if seq_idx is None:
        return places + before
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return places - (places * begins).cummax(1).values + before * (seq_idx == 0)


def _visible(length: int, state: KeyValueState | None, seq_idx: Tensor | None, device) -> Tensor | None:
    """Which of the m + l keys each of l tokens sees, (b, 1, l, m + l) or alike; None for plain causality."""
    if state is None and seq_idx is None:
        return None
    own = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]
    if seq_idx is not None:
        own = own & (seq_idx[:, :, None] == seq_idx[:, None, :])
    if state is not None:
        old = (torch.arange(state.longest, device=device) < state.lengths[:, None])[:, None].expand(-1, length, -1)
        if seq_idx is not None:
            old = old & (seq_idx == 0)[:, :, None]
        own = torch.cat([old, own.expand(len(old), -1, -1)], 2)
    return own[:, None]
