"""States of the sequences in work, in slots: a sequence takes one when its prompt is read, and leaves it at its end."""

import torch

from mlmamba.state import KeyValueState, LayerState, MambaState


class StatePool:
    """States of up to `size` sequences. Memory is allocated with the first state, which gives the shapes.

    Args:
        size: number of slots.
        limit: most tokens of a sequence, prompt and answer. Attention keeps room for so many in every slot.
        moves: whether a freed slot is filled with the last one's state, so that those in use are the first; otherwise
            states stay where they are, `order` says where, and there is one slot more for what is thrown away.
    """

    def __init__(self, size: int, limit: int = 0, moves: bool = True):
        self.size, self.limit, self.moves, self.used = size, limit, moves, 0
        self.order = list(range(size))
        """Slots of the sequences in use, in the order of their rows, and then the free ones."""
        self.layers: list[LayerState | KeyValueState] = []

    @property
    def nbytes(self) -> int:
        """Memory held; the same from the first sequence on."""
        return MambaState(self.layers).nbytes

    def view(self) -> MambaState:
        """The states in use, not copied: a step of one token may write its new states into the slots."""
        return MambaState([slots.head(self.used) for slots in self.layers]).in_place()

    def write(self, state: MambaState) -> None:
        """Store the states after a step, unless the step has written them into the slots itself."""
        for slots, new in zip(self.layers, state.layers, strict=True):
            slots.take(new)

    def append(self, state: MambaState, row: int) -> int:
        """Copy row `row` of a state into a free slot. Returns the row that it has now.

        Raises:
            IndexError: no slot is free.
        """
        if self.used == self.size:
            raise IndexError(f"all {self.size} slots are in use")
        if not self.layers:
            self.layers = [own.slots(self.size + (not self.moves), self.limit) for own in state.layers]
        for slots, new in zip(self.layers, state.layers, strict=True):
            slots.put(self.order[self.used], new, row)
        self.used += 1
        return self.used - 1

    def row(self, row: int) -> MambaState:
        """A copy of a row's state."""
        where = self.layers[0].parts[0].new_tensor([self.order[row]], dtype=torch.long)
        return MambaState(self.layers).select(where)

    def remove(self, row: int) -> None:
        """Free a row's slot. The last row in use takes its place."""
        self.used -= 1
        if not self.moves:
            self.order[row], self.order[self.used] = self.order[self.used], self.order[row]
            return
        for slots in self.layers:
            if row != self.used:
                slots.put(row, slots, self.used)
            slots.keep(self.used)

    def clear(self) -> None:
        """Free every slot."""
        self.used = 0
        for slots in self.layers:
            slots.keep(0)
