"""The slots of the engine: states after a step come to lie in them, wherever the step made them."""

import torch

from mlmamba.state import LayerState, MambaState
from mlmamba.state_pool import StatePool


def test_slots_take_a_state_that_was_made_beside_them():
    """As a compiled step makes it; one in place is left as it is."""
    pool = StatePool(3)
    for value in (1.0, 2.0):
        pool.append(MambaState([LayerState(torch.full((1, 3, 4), value), torch.full((1, 2, 2, 2), value))]), 0)
    own = pool.view()
    own.layers[0].ssm.add_(1)
    pool.write(own)
    assert [float(row.mean()) for row in pool.view().layers[0].ssm] == [2.0, 3.0]
    pool.write(MambaState([LayerState(layer.conv + 10, layer.ssm + 10) for layer in own.layers]))
    assert [float(row.mean()) for row in pool.view().layers[0].ssm] == [12.0, 13.0]
    assert [float(row.mean()) for row in pool.view().layers[0].conv] == [11.0, 12.0]
