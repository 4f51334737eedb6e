"""Mamba-2: mixer, block and language backbone.

Parameter names are those of transformers' Mamba2 (and, but for the plural of `embeddings`, of state-spaces), so weights
map one to one. A_log, D, dt_bias and the recurrent state stay float32 whatever the compute dtype.

Padding is a mask from lengths, never a comparison with the pad id (pad = eos for GPT-NeoX). A masked position neither
feeds the convolution nor moves the state, so right and left padding both leave each row with the state it has alone.
Shapes: b batch, l length, d model width, e inner width (heads x head dim).
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mlmamba import ops
from mlmamba.attention import MLP, Attention, scaled, times
from mlmamba.blocks import KINDS
from mlmamba.configuration import as_text_config
from mlmamba.ops import compiled
from mlmamba.ops.linear import Linear
from mlmamba.selective_scan import RMSNorm, SelectiveScan
from mlmamba.state import KeyValueState, LayerState, MambaState


class Mamba2Mixer(SelectiveScan):
    """The Mamba-2 mixer: in_proj, causal scan, gated norm, out_proj (Dao and Gu 2024, section 7.1)."""

    def __init__(self, config):
        config = as_text_config(config)
        inner = config.num_heads * config.head_dim
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
        self.norm = None
        if config.mixer_norm != "none":
            self.norm = RMSNorm(inner, config.layer_norm_epsilon, config.n_groups, config.mixer_norm == "before_gate")
        self.out_proj = Linear(inner, config.hidden_size, bias=config.use_bias)
        shared = config.n_groups * config.state_size
        self.sizes = (inner, inner, shared, shared, self.heads)
        self.factors, self.out_factor = config.ssm_multipliers or (1.0,) * 5, config.ssm_out_multiplier
        self.dt_limit = tuple(config.time_step_limit)
        self.gated = config.mixer_norm == "gated"
        self.fusible = self.gated and self.out_factor == 1
        self.between: ops.Between | None = None

    def forward(self, x: Tensor, state: LayerState | None = None, mask=None, seq_idx=None, keep_state: bool = True):
        """(b, l, d) -> (b, l, d) and the layer's state afterwards, or None."""
        zxBCdt = scaled(self.in_proj(x), self.sizes, self.factors)
        if state is mask is None and self.fusible and ops.fuses(zxBCdt, self.conv_dim, self.conv1d.kernel_size[0]):
            return self._fused(zxBCdt, seq_idx, keep_state)
        if seq_idx is None and self.between is not None and self.between.compiled and not torch.is_grad_enabled():
            return self._read(zxBCdt, state, mask, keep_state)
        z, xBC, dt = zxBCdt.split([self.inner, self.conv_dim, self.heads], dim=-1)
        y, state = self.scan(xBC, dt, state, mask, seq_idx, keep_state)
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        return times(self.out_proj(y), self.out_factor), state

    def prepare_step(self, make: bool, always: bool = False) -> str:
        """Get ready for `step`, and say how it runs: see `Mamba2Backbone.prepare_decoding`."""
        if not self.gated:
            return "torch: the mixer's norm is of another kind"
        self.between, way = ops.between(self, make, always)
        return way

    def step(self, x: Tensor, state: LayerState, slots: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """One token (b, d) -> (b, d), the state written over, with what `prepare_step` made."""
        if slots is None and not state.conv.is_contiguous():  # as a prompt leaves it
            state = LayerState(state.conv.contiguous(), state.ssm.contiguous(), state.in_place)
        if self.between is None:
            y, state = self(x[:, None], state)
            return y[:, 0], state
        y = self.between(scaled(self.in_proj(x), self.sizes, self.factors), state.conv, state.ssm, slots)
        return times(self.out_proj(y), self.out_factor), state

    def _read(self, zxBCdt: Tensor, state: LayerState | None, mask: Tensor | None, keep_state: bool):
        """`forward` after in_proj, on a CPU for which the step is compiled: a state in the nearest cache takes the
        tokens one by one in less time than in chunks."""
        if state is None:
            rows, between = len(zxBCdt), self.between
            conv = zxBCdt.new_zeros(rows, len(between.taps) - 1, self.conv_dim)
            ssm = zxBCdt.new_zeros(rows, self.heads, self.inner // self.heads, self.state_size, dtype=torch.float32)
        else:
            conv, ssm = (t.clone(memory_format=torch.contiguous_format) for t in (state.conv, state.ssm))
            conv = conv.to(zxBCdt.dtype)
        y = self.between.read(zxBCdt, conv, ssm, mask)
        return times(self.out_proj(y), self.out_factor), LayerState(conv, ssm) if keep_state else None

    def _fused(self, zxBCdt: Tensor, seq_idx: Tensor | None, keep_state: bool):
        """`forward` after in_proj, from the start of sequences without padding: how a GPU trains and reads prompts."""
        y, conv, ssm = ops.block(
            zxBCdt,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            self.dt_bias.float(),
            -torch.exp(self.A_log.float()),
            self.D.float(),
            self.norm.weight,
            eps=self.norm.eps,
            groups=self.groups,
            chunk_size=self.chunk,
            dt_limit=self.dt_limit,
            seq_idx=seq_idx,
            final_state=keep_state,
        )
        return self.out_proj(y), LayerState(conv, ssm) if keep_state else None


class BothMixer(nn.Module):
    """Mamba-2 and attention beside each other on the same input, summed. Its state is a pair."""

    def __init__(self, config):
        super().__init__()
        self.mamba, self.attention = Mamba2Mixer(config), Attention(config)

    @property
    def in_proj(self) -> Linear:
        return self.mamba.in_proj

    def forward(self, x: Tensor, state=None, mask=None, seq_idx=None, keep_state: bool = True):
        """(b, l, d) -> (b, l, d) and the two states afterwards."""
        first, second = state or (None, None)
        y, first = self.mamba(x, first, mask, seq_idx, keep_state)
        z, second = self.attention(x, second, mask, seq_idx, keep_state)
        return y + z, (first, second)


MIXERS = {"mamba2": Mamba2Mixer, "attention": Attention, "mlp": MLP, "both": BothMixer}


class Mamba2Block(nn.Module):
    """Pre-norm residual block around one mixer, of any kind."""

    def __init__(self, config, kind: str = "mamba2"):
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[kind](config)
        self.residual_in_fp32, self.scale = config.residual_in_fp32, config.residual_multiplier
        self.add_norm = ops.add_norm

    def forward(self, x, state=None, mask=None, seq_idx=None, keep_state: bool = True):
        """(b, l, d) -> (b, l, d) and the mixer's state afterwards: of its kind, a pair of `both`, None of an MLP.

        x may be a pair, and so is what it returns then: what the block before gave, and the residual stream without it
        (None for the first block). Their sum and its norm are one step then, as kernels have it.
        """
        if isinstance(x, tuple):
            x, stream = self.normed(*x)
            y, state = self.mixer(x, state, mask, seq_idx, keep_state)
            return (times(y, self.scale), stream), state
        y, state = self.mixer(self.norm(x).to(self.norm.weight.dtype), state, mask, seq_idx, keep_state)
        return (x.float() if self.residual_in_fp32 else x) + times(y, self.scale), state

    def normed(self, y: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the block before gave and the residual stream without it, to the mixer's input and the stream."""
        return self.add_norm(y, stream, self.norm.weight, self.norm.eps, self.residual_in_fp32)

    def step(self, y: Tensor, stream: Tensor | None, state, slots: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        """One token: what the block before gave (b, d), the residual stream without it, and the mixer's state. Returns
        the same of this block."""
        x, stream = self.normed(y, stream)
        if self.kind == "mamba2":
            y, state = self.mixer.step(x, state, slots)
        else:
            y, state = self.mixer(x[:, None], state)
            y = y[:, 0]
        return times(y, self.scale), stream, state

    def own_state(self, states: Iterator) -> LayerState | KeyValueState | tuple | None:
        """The mixer's state out of those of a model, in order."""
        own = tuple(islice(states, len(KINDS[self.kind])))
        return own if len(own) > 1 else own[0] if own else None

    def as_list(self, state) -> list:
        """The mixer's state as entries of a model's, of which an MLP has none."""
        return [] if not KINDS[self.kind] else [*state] if isinstance(state, tuple) else [state]


class Mamba2Backbone(nn.Module):
    """Embeddings, blocks of the kinds that the config lists, and the final norm.

    `embedding_multiplier` and `logits_scaling` (Granite's) act on what the blocks get and on what the head gets.
    """

    def __init__(self, config):
        super().__init__()
        config = as_text_config(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Mamba2Block(config, kind) for kind in config.kinds)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.scale_in, self.scale_out = config.embedding_multiplier, config.logits_scaling
        self.gradient_checkpointing = False
        self.prepared = self.compiled = False
        nn.init.normal_(self.embeddings.weight, std=config.initializer_range)
        for name, weight in self.layers.named_parameters():
            if name.endswith("out_proj.weight"):  # GPT-2's scheme, as state-spaces does it: one residual branch a block
                weight.data.div_(math.sqrt(config.num_hidden_layers))

    def prepare_decoding(self, make: bool, always: bool = False) -> str:
        """From now on a step of one token takes the fast way, on states that may be written over. Weights must stay.

        Args:
            make: compile code for this processor where there is none yet (mlmamba/ops/compiled.py).
            always: take compiled code also where states are so small that it is no faster.

        Returns:
            How steps run: "kernels", "compiled", or "torch" with the reason.
        """
        ways = [layer.mixer.prepare_step(make, always) for layer in self.layers if layer.kind == "mamba2"]
        self.prepared = True
        way = next((way for way in ways if way.startswith("torch")), ways[0] if ways else "torch")
        if way == "compiled":
            self._use_compiled()
        return way

    def _use_compiled(self) -> None:
        self.compiled = True
        for layer in self.layers:
            layer.add_norm = compiled.operators(make=False).add_norm

    def forward(
        self,
        embeds: Tensor,
        state: MambaState | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, MambaState | None]:
        """Run embeddings (b, l, d) on from `state` (None for the start).

        Args:
            mask: (b, l) bool, False at padding, or None when there is none.
            seq_idx: (b, l) integers marking the sequences of a packed row, or None.
            keep_state: False in training, where no state is wanted: those of all blocks are 168 MB a row at 2.7b.

        Returns:
            Hidden states (b, l, d) after the final norm, and the new state, or None.
        """
        x, after = times(embeds, self.scale_in), []
        if mask is not None:
            # Padding to the end of each row, so that what comes follows directly on the state.
            order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)
            x, mask = _reorder(x, order), mask.gather(1, order)
            if seq_idx is not None:  # padding belongs to the last sequence: it ends none
                last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
                seq_idx = seq_idx.gather(1, order.gather(1, torch.arange(x.shape[1], device=x.device).minimum(last)))
        if seq_idx is not None:  # numbered through, as the operators need it: an id that comes back is a new sequence
            seq_idx = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1)
        known = state is not None and state.layers  # an empty state is a start
        if known and self._steps(x, state) and mask is seq_idx is None:
            x, after = self.decode(embeds[:, 0], state.layers)
            return x[:, None], MambaState(after)
        states = iter(state.layers if known else ())
        checkpointed = self.gradient_checkpointing and self.training
        ours = self.compiled and not torch.is_grad_enabled()  # then a prompt has the bits of its tokens one by one
        if ours or (ops.fuses_norm(x) and not checkpointed):  # a checkpoint would keep two tensors of each block
            x = (x, None)
        for layer in self.layers:
            before = layer.own_state(states) if known else None
            if checkpointed:
                x, layer_state = checkpoint(layer, x, before, mask, seq_idx, keep_state, use_reentrant=False)
            else:
                x, layer_state = layer(x, before, mask, seq_idx, keep_state)
            after += layer.as_list(layer_state)
        if ours:
            x = self._last_norm(*x)
        elif isinstance(x, tuple):  # called as a module, the norm may be on another GPU than the last block
            y, stream = x
            x = self.norm_f(stream + y)
        else:
            x = self.norm_f(x)
        x = times(x.to(self.embeddings.weight.dtype), 1 / self.scale_out)
        x = x if mask is None else _reorder(x, torch.argsort(order, dim=1))
        return x, MambaState(after) if keep_state else None

    def _steps(self, x: Tensor, state: MambaState) -> bool:
        """Whether x (b, l, d) is a token for each row that `decode` takes."""
        own = self.prepared and x.shape[1] == 1 and not torch.is_grad_enabled()
        return own and all(layer.in_place for layer in state.layers)

    def decode(self, embeds: Tensor, states: list, slots: Tensor | None = None) -> tuple[Tensor, list]:
        """One token of each row, without gradients, after `prepare_decoding`.

        Args:
            embeds: (b, d).
            states: of the mixers, in order; written over.
            slots: (b,) int32, where in the states of Mamba-2 mixers the rows lie; None when they are the first b.

        Returns:
            Hidden states (b, d) after the final norm, and the states, which attention makes anew.
        """
        y, stream = times(embeds, self.scale_in), None
        left, after = iter(states), []
        for layer in self.layers:
            y, stream, state = layer.step(y, stream, layer.own_state(left), slots)
            after += layer.as_list(state)
        return times(self._last_norm(y, stream), 1 / self.scale_out), after

    def _last_norm(self, y: Tensor, stream: Tensor) -> Tensor:
        last = self.layers[-1]
        return last.add_norm(y, stream, self.norm_f.weight, self.norm_f.eps, last.residual_in_fp32)[0]


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
