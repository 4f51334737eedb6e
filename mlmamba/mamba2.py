"""Mamba-2: selective scan, mixer, block, language backbone and the recurrent state of a batch.

Parameter names are those of transformers' Mamba2 (and, but for the plural of `embeddings`, of state-spaces), so weights
map one to one. A_log, D, dt_bias and the recurrent state stay float32 whatever the compute dtype.

Padding is a mask from lengths, never a comparison with the pad id (pad = eos for GPT-NeoX). A masked position neither
feeds the convolution nor moves the state, so right and left padding both leave each row with the state it has alone.
Shapes: b batch, l length, d model width, e inner width (heads x head dim).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mlmamba import ops
from mlmamba.ops.linear import Linear


@dataclass
class LayerState:
    """What one layer remembers: the last inputs of the convolution (b, w-1, e + 2gn) and the SSM state (b, h, p, n)."""

    conv: Tensor
    ssm: Tensor


class MambaState:
    """Recurrent state of a batch, one LayerState per layer. Its size does not depend on how much was read."""

    is_compileable = False  # `generate` asks this of a state that it is given

    def __init__(self, layers: list[LayerState] | None = None):
        self.layers = layers or []

    def select(self, rows: Tensor) -> "MambaState":
        """State of the given rows (k,), in that order. Rows may repeat: one prefix can start many continuations."""
        return MambaState([LayerState(s.conv.index_select(0, rows), s.ssm.index_select(0, rows)) for s in self.layers])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In-place `select`, under the name that beam search calls."""
        self.layers = self.select(beam_idx).layers

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row in place, under the name that transformers' caches give it."""
        rows = torch.arange(self.layers[0].ssm.shape[0], device=self.layers[0].ssm.device)
        self.layers = self.select(rows.repeat_interleave(repeats)).layers

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for s in self.layers for t in (s.conv, s.ssm))


class RMSNorm(nn.Module):
    """Root mean square norm over each of `groups` equal parts, in float32. With a gate: norm(x * silu(gate))."""

    def __init__(self, width: int, eps: float, groups: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        dtype = x.dtype
        x = x.float()
        if gate is not None:
            x = x * F.silu(gate.float())
        if self.groups == 1:
            return F.rms_norm(x, x.shape[-1:], self.weight.float(), self.eps).to(dtype)
        parts = x.unflatten(-1, (self.groups, -1))
        x = F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        return (self.weight.float() * x).to(dtype)


class SelectiveScan(nn.Module):
    """Short convolution and state-space recurrence with one set of A, D and dt bias: the part with a direction.

    `Mamba2Mixer` is one of these between two projections; the 2-D scan of the connector holds one per scan order.
    """

    def __init__(
        self, inner: int, heads: int, state: int, groups: int, kernel: int, chunk: int, conv_bias: bool = True
    ):
        super().__init__()
        self.inner, self.heads, self.state_size, self.groups, self.chunk = inner, heads, state, groups, chunk
        self.conv_dim = inner + 2 * groups * state
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, kernel, groups=self.conv_dim, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(heads, dtype=torch.float32))
        self.dt_limit = (0.0, math.inf)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> None:
        """Initialise as state-spaces does: A uniform in 1..16, dt log-uniform in dt_min..dt_max, D one."""
        self.A_log.uniform_(1, 16).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=dt_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.D.fill_(1.0)

    def _apply(self, fn, recurse: bool = True):
        """Casts of the model to half precision (`model.bfloat16()`) leave A_log, dt_bias and D as they are."""
        own = (self.A_log, self.dt_bias, self.D)
        kept = {id(t) for t in (*own, *(p.grad for p in own))}

        def guarded(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if id(t) in kept and out.dtype in (torch.float16, torch.bfloat16) else out

        return super()._apply(guarded, recurse)

    def scan(
        self,
        xBC: Tensor,
        dt: Tensor,
        state: LayerState | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Run xBC (b, l, e + 2gn) and raw dt (b, l, h) through convolution and recurrence.

        Given a state, padding stands at the end of a row (`Mamba2Backbone` sees to it): the convolution looks straight
        back into the state. Returns y (b, l, e) and the state after the last unmasked position of each row.
        """
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        A, D = -torch.exp(self.A_log.float()), self.D.float()
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if self.dt_limit != (0.0, math.inf):
            dt = dt.clamp(*self.dt_limit)

        if state is not None and xBC.shape[1] == 1 and mask is None:
            out, conv = ops.causal_conv1d_step(xBC[:, 0], weight, bias, state.conv)
            x, B, C = self._split(out)
            y, ssm = ops.ssd_step(x, dt[:, 0], A, B, C, D, state.ssm)
            return y.flatten(1)[:, None], LayerState(conv, ssm)

        if mask is not None:
            xBC, dt = xBC * mask[..., None], dt * mask[..., None]
        out, conv = ops.causal_conv1d(
            xBC, weight, bias, initial_state=None if state is None else state.conv, seq_idx=seq_idx
        )
        if mask is not None:
            conv = self._last_inputs(xBC, state, mask, seq_idx)
        x, B, C = self._split(out)
        y, ssm = ops.ssd(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            initial_state=None if state is None else state.ssm,
            seq_idx=seq_idx,
            chunk_size=self.chunk,
        )
        return y.flatten(2), LayerState(conv, ssm)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = xBC.split([self.inner, self.groups * self.state_size, self.groups * self.state_size], dim=-1)
        B, C = (t.unflatten(-1, (self.groups, self.state_size)) for t in (B, C))
        return x.unflatten(-1, (self.heads, -1)), B, C

    def _last_inputs(self, xBC: Tensor, state: LayerState | None, mask: Tensor, seq_idx: Tensor | None) -> Tensor:
        """The convolution's last w-1 inputs of each row, counted back from its last unmasked position."""
        w, length = self.conv1d.kernel_size[0], xBC.shape[1]
        history = xBC.new_zeros(len(xBC), w - 1, xBC.shape[2]) if state is None else state.conv.to(xBC.dtype)
        padded = torch.cat([history, xBC], dim=1)
        positions = torch.arange(1, length + 1, device=xBC.device)
        end = (positions * mask).amax(dim=1)  # 0 for a row of nothing but padding: it keeps its history
        index = end[:, None] + torch.arange(w - 1, device=xBC.device)
        last = padded.gather(1, index[..., None].expand(-1, -1, padded.shape[2]))
        if seq_idx is not None:  # inputs of an earlier sequence count as zero
            owner = torch.cat([seq_idx[:, :1].expand(-1, w - 1), seq_idx], dim=1)
            last = last * (owner.gather(1, index) == owner.gather(1, end[:, None] + w - 2))[..., None]
        return last


class Mamba2Mixer(SelectiveScan):
    """The Mamba-2 mixer: in_proj, causal scan, gated norm, out_proj (Dao and Gu 2024, section 7.1)."""

    def __init__(self, config):
        inner = config.expand * config.hidden_size
        super().__init__(
            inner,
            config.num_heads,
            config.state_size,
            config.n_groups,
            config.conv_kernel,
            config.chunk_size,
            config.use_conv_bias,
        )
        self.in_proj = Linear(config.hidden_size, inner + self.conv_dim + self.heads, bias=config.use_bias)
        self.norm = RMSNorm(inner, config.layer_norm_epsilon, config.n_groups)
        self.out_proj = Linear(inner, config.hidden_size, bias=config.use_bias)
        self.dt_limit = tuple(config.time_step_limit)

    def forward(self, x: Tensor, state: LayerState | None = None, mask=None, seq_idx=None):
        """(b, l, d) -> (b, l, d) and the layer's state afterwards."""
        z, xBC, dt = self.in_proj(x).split([self.inner, self.conv_dim, self.heads], dim=-1)
        y, state = self.scan(xBC, dt, state, mask, seq_idx)
        return self.out_proj(self.norm(y, z)), state


class Mamba2Block(nn.Module):
    """Pre-norm residual block around one mixer."""

    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(config)
        self.residual_in_fp32 = config.residual_in_fp32

    def forward(self, x: Tensor, state: LayerState | None = None, mask=None, seq_idx=None):
        y, state = self.mixer(self.norm(x).to(self.mixer.in_proj.weight.dtype), state, mask, seq_idx)
        return (x.float() if self.residual_in_fp32 else x) + y, state


class Mamba2Backbone(nn.Module):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Mamba2Block(config) for _ in range(config.num_hidden_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        nn.init.normal_(self.embeddings.weight, std=config.initializer_range)
        for layer in self.layers:  # GPT-2's scheme, as state-spaces does it: one residual branch per block
            layer.mixer.out_proj.weight.data.div_(math.sqrt(config.num_hidden_layers))

    def forward(
        self,
        embeds: Tensor,
        state: MambaState | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, MambaState]:
        """Run embeddings (b, l, d) on from `state` (None for the start).

        Args:
            mask: (b, l) bool, False at padding, or None when there is none.
            seq_idx: (b, l) integers marking the sequences of a packed row, or None.

        Returns:
            Hidden states (b, l, d) after the final norm, and the new state.
        """
        x, after = embeds, []
        if mask is not None:
            # Padding to the end of each row, so that what comes follows directly on the state.
            order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)
            x, mask = _reorder(x, order), mask.gather(1, order)
            if seq_idx is not None:  # padding belongs to the last sequence: it ends none
                last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
                seq_idx = seq_idx.gather(1, order.gather(1, torch.arange(x.shape[1], device=x.device).minimum(last)))
        if seq_idx is not None:  # numbered through, as the operators need it: an id that comes back is a new sequence
            seq_idx = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1)
        for i, layer in enumerate(self.layers):
            before = state.layers[i] if state is not None and state.layers else None
            if self.gradient_checkpointing and self.training:
                x, layer_state = checkpoint(layer, x, before, mask, seq_idx, use_reentrant=False)
            else:
                x, layer_state = layer(x, before, mask, seq_idx)
            after.append(layer_state)
        x = self.norm_f(x).to(self.embeddings.weight.dtype)
        return x if mask is None else _reorder(x, torch.argsort(order, dim=1)), MambaState(after)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Positions of x (b, l, d) in the given order (b, l)."""
    return x.gather(1, order[..., None].expand_as(x))


class Mamba2LanguageModel(nn.Module):
    """Backbone and language head, under the key names of transformers' Mamba2ForCausalLM."""

    def __init__(self, config):
        super().__init__()
        self.backbone = Mamba2Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
