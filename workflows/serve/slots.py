"""The slots: recurrent states of the answers that are being made, allocated once for the largest batch.

A state is of constant size whatever was read, so a slot never grows, and a sequence joins or leaves by one row's copy.
Rows in use are always the first ones: a step reads them as a view.
"""

import torch
from torch import Tensor

from mlmamba.state import LayerState, MambaState


class StatePool:
    """States of up to `size` sequences. The memory is taken with the first of them, whose state has the shapes."""

    def __init__(self, size: int):
        self.size, self.used = size, 0
        self._layers: list[LayerState] = []

    @property
    def nbytes(self) -> int:
        """Memory held; the same from the first sequence on."""
        return MambaState(self._layers).nbytes

    def view(self) -> MambaState:
        """The states in use, not copied: a step of one token may leave its new states in the slots."""
        return MambaState([LayerState(s.conv[: self.used], s.ssm[: self.used]) for s in self._layers]).in_place()

    def write(self, state: MambaState) -> None:
        """Put the states after a step in place of those before it, where the step has not done so."""
        for own, new in zip(self._layers, state.layers, strict=True):
            for slots, rows in ((own.conv, new.conv), (own.ssm, new.ssm)):
                if rows.data_ptr() != slots.data_ptr():
                    slots[: self.used].copy_(rows)

    def append(self, state: MambaState, row: int) -> int:
        """Take a slot for row `row` of a state, and return its number.

        Raises:
            IndexError: no slot is free.
        """
        if self.used == self.size:
            raise IndexError(f"all {self.size} slots are in use")
        if not self._layers:
            self._layers = [LayerState(self._room(s.conv), self._room(s.ssm)) for s in state.layers]
        for own, new in zip(self._layers, state.layers, strict=True):
            own.conv[self.used].copy_(new.conv[row])
            own.ssm[self.used].copy_(new.ssm[row])
        self.used += 1
        return self.used - 1

    def remove(self, slot: int) -> None:
        """Free a slot. The last slot in use moves to its place."""
        self.used -= 1
        if slot == self.used:
            return
        for own in self._layers:
            own.conv[slot].copy_(own.conv[self.used])
            own.ssm[slot].copy_(own.ssm[self.used])

    def clear(self) -> None:
        """Free every slot."""
        self.used = 0

    def _room(self, tensor: Tensor) -> Tensor:
        return tensor.new_zeros(self.size, *tensor.shape[1:])


def stack(states: list[MambaState | None]) -> MambaState | None:
    """One state of several sequences of one row each; None stands for one that has read nothing yet."""
    known = next((state for state in states if state is not None), None)
    if known is None:
        return None
    layers = []
    for i, layer in enumerate(known.layers):
        start = LayerState(torch.zeros_like(layer.conv), torch.zeros_like(layer.ssm))
        rows = [start if state is None else state.layers[i] for state in states]
        layers.append(LayerState(torch.cat([row.conv for row in rows]), torch.cat([row.ssm for row in rows])))
    return MambaState(layers)
