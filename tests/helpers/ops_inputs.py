"""Random operator inputs, for the tests of every path: all of them leaves, so that every gradient can be compared."""

import torch
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-10}
BOUNDARIES = (5, 3, 6)  # lengths of packed sequences; with chunks of 4 they cross, meet and share chunks
BATCH, HEADS, HEAD_DIM, STATE, CHANNELS, WIDTH = 2, 4, 3, 5, 6, 4


def sequence_index(length: int, device: str = "cpu") -> Tensor:
    """(b, length) boundaries, different in each row."""
    repeats = -(-(length + 2) // sum(BOUNDARIES))
    whole = torch.repeat_interleave(torch.arange(len(BOUNDARIES) * repeats), torch.tensor(BOUNDARIES * repeats))
    return torch.stack([whole[:length], whole[2 : length + 2]])[:BATCH].to(device)


def ssd_inputs(
    length: int,
    groups: int = 1,
    with_state: bool = False,
    packed: bool = False,
    dtype=torch.float32,
    device="cpu",
    head_dim: int = HEAD_DIM,
    state: int = STATE,
) -> dict:
    """Arguments of `ssd`. Step sizes and parameters are float32 in half precision too, as the mixer passes them."""
    g = torch.Generator().manual_seed(length)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    b = BATCH if packed else 2

    def leaf(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=wide).to(device, dtype).requires_grad_()

    inputs = {
        "x": leaf(b, length, HEADS, head_dim),
        "dt": F.softplus(torch.randn(b, length, HEADS, generator=g, dtype=wide)).to(device).requires_grad_(),
        "A": (-torch.rand(HEADS, generator=g, dtype=wide) - 0.1).to(device).requires_grad_(),
        "B": leaf(b, length, groups, state),
        "C": leaf(b, length, groups, state),
        "D": leaf(HEADS, dtype=wide),
        "initial_state": leaf(b, HEADS, head_dim, state, dtype=wide) if with_state else None,
        "seq_idx": sequence_index(length, device) if packed else None,
    }
    return inputs


def conv_inputs(
    length: int,
    with_state: bool = False,
    packed: bool = False,
    dtype=torch.float32,
    device="cpu",
    channels: int = CHANNELS,
) -> dict:
    """Arguments of `causal_conv1d`."""
    g = torch.Generator().manual_seed(length)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def leaf(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=wide).to(device, dtype).requires_grad_()

    return {
        "x": leaf(BATCH, length, channels),
        "weight": leaf(channels, WIDTH),
        "bias": leaf(channels),
        "initial_state": leaf(BATCH, WIDTH - 1, channels) if with_state else None,
        "seq_idx": sequence_index(length, device) if packed else None,
    }
