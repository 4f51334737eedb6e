"""What a model remembers of each sequence of a batch: one state for each mixer that remembers something, in order.

A Mamba-2 mixer's state is constant in size, and so is a pure Mamba-2 model's. Attention's grows with every token, up to
the maximum that the model states; an MLP has none. Rows are sequences, first in every tensor, so that states can be
chosen, joined and put into slots without a look at their kind.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class LayerState:
    """Of a Mamba-2 mixer: the last inputs of the convolution (b, w-1, e + 2gn) and the SSM state (b, h, p, n).

    The methods are those of every kind of state.
    """

    conv: Tensor
    ssm: Tensor
    in_place: bool = False
    """A step of one token may write the new state over this one."""

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All tensors, rows first."""
        return self.conv, self.ssm

    @property
    def rows(self) -> int:
        return len(self.parts[0])

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts)

    def select(self, rows: Tensor) -> "LayerState":
        """The given rows (k,), copied."""
        return LayerState(*(t.index_select(0, rows) for t in self.parts))

    def own(self, in_place: bool = True) -> "LayerState":
        """The same tensors, for a step that may write over them or, with False, may not."""
        return LayerState(*self.parts, in_place=in_place)

    def to(self, device: torch.device | str) -> "LayerState":
        """On a device; what lies there already is not copied."""
        return LayerState(*(t.to(device) for t in self.parts))

    def head(self, rows: int) -> "LayerState":
        """The first rows, not copied."""
        return LayerState(*(t[:rows] for t in self.parts))

    def start(self) -> "LayerState":
        """As many rows that have read nothing."""
        return LayerState(*(torch.zeros_like(t) for t in self.parts))

    def slots(self, size: int, limit: int) -> "LayerState":
        """Room for `size` rows, none of which reads more than `limit` tokens."""
        return LayerState(*(t.new_zeros(size, *t.shape[1:]) for t in self.parts))

    def put(self, slot: int, other: "LayerState", row: int) -> None:
        """Copy row `row` of another state over row `slot`."""
        for own, new in zip(self.parts, other.parts, strict=True):
            own[slot].copy_(new[row])

    def take(self, new: "LayerState") -> None:
        """Copy the rows of another state over the first rows, unless they lie there already."""
        for own, rows in zip(self.parts, new.parts, strict=True):
            if own.data_ptr() != rows.data_ptr():
                own[: len(rows)].copy_(rows)

    def keep(self, rows: int) -> None:
        """From now on only the first rows count."""

    @staticmethod
    def join(states: "list[LayerState]") -> "LayerState":
        """The rows of several states, one after the other."""
        return LayerState(*(torch.cat(ts) for ts in zip(*(state.parts for state in states), strict=True)))


@dataclass
class KeyValueState:
    """Of attention: keys and values (b, g, c, d) of `lengths` (b,) tokens, and free places behind them.

    A row's tokens lie at 0, 1, ... without gaps, whatever padding its prompt had. Methods as of LayerState.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    longest: int
    """The largest of `lengths`, kept on the host so that no step waits for the device."""
    in_place: bool = False

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.lengths

    rows = LayerState.rows
    nbytes = LayerState.nbytes

    def select(self, rows: Tensor) -> "KeyValueState":
        lengths = self.lengths.index_select(0, rows)
        longest = int(lengths.max())
        return KeyValueState(
            *(t[:, :, :longest].index_select(0, rows) for t in (self.keys, self.values)), lengths, longest
        )

    def own(self, in_place: bool = True) -> "KeyValueState":
        return KeyValueState(*self.parts, self.longest, in_place)

    def to(self, device: torch.device | str) -> "KeyValueState":
        return KeyValueState(*(t.to(device) for t in self.parts), self.longest)

    def head(self, rows: int) -> "KeyValueState":
        return KeyValueState(*(t[:rows] for t in self.parts), self.longest)

    def start(self) -> "KeyValueState":
        return KeyValueState(self.keys[:, :, :0], self.values[:, :, :0], torch.zeros_like(self.lengths), 0)

    def slots(self, size: int, limit: int) -> "KeyValueState":
        keys, values = (t.new_zeros(size, t.shape[1], limit, t.shape[3]) for t in (self.keys, self.values))
        return KeyValueState(keys, values, self.lengths.new_zeros(size), 0)

    def put(self, slot: int, other: "KeyValueState", row: int) -> None:
        self.keys[slot, :, : other.longest].copy_(other.keys[row, :, : other.longest])
        self.values[slot, :, : other.longest].copy_(other.values[row, :, : other.longest])
        self.lengths[slot].copy_(other.lengths[row])
        self.longest = max(self.longest, other.longest)

    def take(self, new: "KeyValueState") -> None:
        LayerState.take(self, new)
        self.longest = new.longest

    def keep(self, rows: int) -> None:
        self.longest = int(self.lengths[:rows].max()) if rows else 0

    @staticmethod
    def join(states: "list[KeyValueState]") -> "KeyValueState":
        longest = max(state.longest for state in states)
        keys, values = (
            torch.cat([resized(getattr(state, name)[:, :, : state.longest], longest) for state in states])
            for name in ("keys", "values")
        )
        return KeyValueState(keys, values, torch.cat([state.lengths for state in states]), longest)


def resized(t: Tensor, places: int) -> Tensor:
    """Keys or values (b, g, c, d) with at least so many places; the same tensor where it has them."""
    return t if t.shape[2] >= places else F.pad(t, (0, 0, 0, places - t.shape[2]))


class MambaState:
    """State of a batch: `layers` holds one LayerState or KeyValueState for each mixer that remembers something."""

    is_compileable = False  # `generate` asks this of a state that it is given

    def __init__(self, layers: list[LayerState | KeyValueState] | None = None, read: list[list[int]] | None = None):
        self.layers = layers or []
        self.read = read
        """Tokens that each row has read, where `generate` made the state from their beginning; else None."""

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.layers[0].rows if self.layers else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row, where attention keeps them; else 0."""
        return max((state.longest for state in self.layers if isinstance(state, KeyValueState)), default=0)

    @property
    def device(self) -> torch.device | None:
        return self.layers[0].parts[0].device if self.layers else None

    def select(self, rows: Tensor) -> "MambaState":
        """State of the given rows (k,), in that order. Rows may repeat: one prefix can start many continuations."""
        read = None if self.read is None else [self.read[row] for row in rows.tolist()]
        return MambaState([state.select(rows) for state in self.layers], read)

    def to(self, device: torch.device | str) -> "MambaState":
        """The state on a device; what lies there already is not copied."""
        return MambaState([state.to(device) for state in self.layers], self.read)

    def in_place(self) -> "MambaState":
        """The same tensors, for decoding without a copy: a step of one token may write the new state over the old one.

        For a state that nobody else goes on from. What comes back holds the new state, wherever it lies: reading
        several tokens makes a new one all the same, and so does a compiled step.
        """
        return MambaState([state.own() for state in self.layers])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In-place `select`, under the name that beam search calls."""
        self.layers = self.select(beam_idx).layers

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row in place, under the name that transformers' caches give it."""
        rows = torch.arange(self.rows, device=self.device)
        self.layers = self.select(rows.repeat_interleave(repeats)).layers

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.layers)
