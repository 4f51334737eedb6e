"""Recurrent state of a batch of sequences: what the model remembers of everything read. Its size is constant."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerState:
    """What one layer remembers: the last inputs of the convolution (b, w-1, e + 2gn) and the SSM state (b, h, p, n)."""

    conv: Tensor
    ssm: Tensor
    in_place: bool = False


class MambaState:
    """Recurrent state of a batch, one LayerState per layer. Its size does not depend on how much was read."""

    is_compileable = False  # `generate` asks this of a state that it is given

    def __init__(self, layers: list[LayerState] | None = None, read: list[list[int]] | None = None):
        self.layers = layers or []
        self.read = read
        """Tokens that each row has read, where `generate` made the state from their beginning; else None."""

    def select(self, rows: Tensor) -> "MambaState":
        """State of the given rows (k,), in that order. Rows may repeat: one prefix can start many continuations."""
        layers = [LayerState(s.conv.index_select(0, rows), s.ssm.index_select(0, rows)) for s in self.layers]
        return MambaState(layers, None if self.read is None else [self.read[row] for row in rows.tolist()])

    def in_place(self) -> "MambaState":
        """The same tensors, for decoding without a copy: a step of one token may write the new state over the old one.

        For a state that nobody else goes on from. What comes back holds the new state, wherever it lies: reading
        several tokens makes a new one all the same, and so does a compiled step.
        """
        return MambaState([LayerState(s.conv, s.ssm, in_place=True) for s in self.layers])

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
