"""The short convolution as Triton kernels of our own, for a GPU on which causal_conv1d's extension does not import.

Triton comes with torch and compiles where it runs, so this needs no CUDA compiler. Two kernels compute gradients: the
first those of the sums before their SiLU and, block by block, of weight and bias, the second spreads them over the
inputs. No result depends on the order in which programs run. Shapes are those of naive.py; arithmetic is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlmamba.ops.convolution import last_inputs

TAPS = 4
"""The widest convolution that the kernels take."""
_LENGTH, _CHANNELS = 16, 128  # of a block: twice as long, registers would spill


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `naive.causal_conv1d`, for float32 and half precision. Differentiable once.

    Raises:
        ValueError: more than TAPS taps.
    """
    b, _, d = x.shape
    w = weight.shape[1]
    if w > TAPS:
        raise ValueError(f"the kernels take {TAPS} taps at most, the convolution has {w}")
    history = x.new_zeros(b, w - 1, d) if initial_state is None else initial_state.to(x.dtype)
    bias = weight.new_zeros(d) if bias is None else bias
    return _ConvSiLU.apply(x, history, weight, bias, seq_idx), last_inputs(x, history, seq_idx)


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, activation: str, conv_state_indices: Tensor | None
) -> Tensor:
    """One position of each row, in place, with the arguments of causal_conv1d's function of this name.

    Args:
        x: (b, d).
        state: (s, d, w-1), the last inputs, those of one position beside each other in memory.
        weight, bias: (d, w) and (d,).
        activation: "silu".
        conv_state_indices: (b,) int32, where in the state the rows lie, or None for the first b.
    """
    (b, d), w = x.shape, weight.shape[1]
    y, weight = torch.empty(b, d, dtype=x.dtype, device=x.device), weight.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    grid = (triton.cdiv(d, _CHANNELS), b)
    slots = conv_state_indices
    with torch.cuda.device(x.device.index):
        arguments = (x, state, slots, weight, bias, y, d, x.stride(0), state.stride(0))
        _update[grid](*arguments, TAPS=w, PLACED=slots is not None, CHANNELS=_CHANNELS)
    return y


class _ConvSiLU(torch.autograd.Function):
    """x (b, l, d), history (b, w-1, d), weight (d, w), bias (d,), seq_idx (b, l) or None -> (b, l, d)."""

    @staticmethod
    def forward(ctx, x, history, weight, bias, seq_idx):
        x, history, weight, bias = (t.contiguous() for t in (x, history, weight, bias))
        seq_idx = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
        ctx.save_for_backward(x, history, weight, bias, seq_idx)
        y = torch.empty_like(x)
        _launch(_forward, x, x.shape[1], (x, history, weight, bias, seq_idx, y), weight.shape[1], seq_idx)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, history, weight, bias, seq_idx = ctx.saved_tensors
        (b, length, d), w = x.shape, weight.shape[1]
        dpre = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        blocks = b * triton.cdiv(length, _LENGTH)
        parts = torch.empty(blocks, w + 1, d, dtype=torch.float32, device=x.device)
        arguments = (x, history, weight, bias, seq_idx, dy.contiguous(), dpre, parts)
        _launch(_before_silu, x, length, arguments, w, seq_idx)
        dx, dhistory = torch.empty_like(x), torch.empty_like(history)
        _launch(_spread, x, length + w - 1, (dpre, weight, seq_idx, dx, dhistory), w, seq_idx)
        sums = parts.sum(0)
        return dx, dhistory, sums[:w].t().to(weight.dtype), sums[w].to(bias.dtype), None


def _launch(kernel, x: Tensor, positions: int, arguments: tuple, taps: int, seq_idx: Tensor | None) -> None:
    b, length, d = x.shape
    grid = (triton.cdiv(d, _CHANNELS), triton.cdiv(positions, _LENGTH), b)
    with torch.cuda.device(x.device.index):
        kernel[grid](*arguments, length, d, TAPS=taps, PACKED=seq_idx is not None, LENGTH=_LENGTH, CHANNELS=_CHANNELS)


@triton.jit
def _update(
    x, state, slots, weight, bias, y, d, row_stride, slot_stride,
    TAPS: tl.constexpr, PLACED: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    slot = tl.load(slots + row).to(tl.int64) if PLACED else row
    known = c < d
    now = tl.load(x + row * row_stride + c, mask=known, other=0.0)
    tap = tl.load(weight + c * TAPS + TAPS - 1, mask=known, other=0.0).to(tl.float32)
    total = tl.load(bias + c, mask=known, other=0.0).to(tl.float32) + now.to(tl.float32) * tap
    place = state + slot * slot_stride + c
    for i in tl.static_range(TAPS - 1):
        old = tl.load(place + i * d, mask=known, other=0.0)
        total += old.to(tl.float32) * tl.load(weight + c * TAPS + i, mask=known, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(place + (i - 1) * d, old, mask=known)
    tl.store(place + (TAPS - 2) * d, now, mask=known)
    out = total * tl.sigmoid(total)
    tl.store(y + row * d + c, out.to(y.dtype.element_ty), mask=known)


@triton.jit
def _inputs(x, history, seq_idx, t, back, channels, row, length, d, TAPS: tl.constexpr, PACKED: tl.constexpr):
    """What the tap `back` positions ago sees from positions t: x, or the history before it; 0 of another sequence."""
    at = t - back
    inside, known = (t < length)[:, None], (channels < d)[None, :]
    now = (at >= 0)[:, None]
    before = (row * (TAPS - 1) + at + TAPS - 1)[:, None] * d + channels[None, :]
    value = tl.load(x + (row * length + at)[:, None] * d + channels[None, :], mask=inside & known & now, other=0.0)
    older = tl.load(history + before, mask=inside & known & (at < 0)[:, None], other=0.0)
    value = tl.where(now, value.to(tl.float32), older.to(tl.float32))
    if PACKED:
        own = tl.load(seq_idx + row * length + t, mask=t < length, other=0)
        theirs = tl.load(seq_idx + row * length + tl.maximum(at, 0), mask=t < length, other=0)
        value = tl.where((own == theirs)[:, None], value, 0.0)
    return value


@triton.jit
def _before(x, history, weight, bias, seq_idx, t, c, row, length, d, TAPS: tl.constexpr, PACKED: tl.constexpr):
    """The convolution before its SiLU, (LENGTH, CHANNELS)."""
    total = tl.load(bias + c, mask=c < d, other=0.0).to(tl.float32)[None, :] + tl.zeros((t.shape[0], 1), tl.float32)
    for back in tl.static_range(TAPS):
        tap = tl.load(weight + c * TAPS + (TAPS - 1 - back), mask=c < d, other=0.0).to(tl.float32)
        total += _inputs(x, history, seq_idx, t, back, c, row, length, d, TAPS, PACKED) * tap[None, :]
    return total


@triton.jit
def _forward(
    x, history, weight, bias, seq_idx, y, length, d,
    TAPS: tl.constexpr, PACKED: tl.constexpr, LENGTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * LENGTH + tl.arange(0, LENGTH)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = _before(x, history, weight, bias, seq_idx, t, c, row, length, d, TAPS, PACKED)
    out = total * tl.sigmoid(total)
    here = (t < length)[:, None] & (c < d)[None, :]
    tl.store(y + (row * length + t)[:, None] * d + c[None, :], out.to(y.dtype.element_ty), mask=here)


@triton.jit
def _before_silu(
    x, history, weight, bias, seq_idx, dy, dpre, parts, length, d,
    TAPS: tl.constexpr, PACKED: tl.constexpr, LENGTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient before the SiLU into dpre, and this block's share of those of weight and bias into parts."""
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * LENGTH + tl.arange(0, LENGTH)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    here = (t < length)[:, None] & (c < d)[None, :]
    place = (row * length + t)[:, None] * d + c[None, :]
    total = _before(x, history, weight, bias, seq_idx, t, c, row, length, d, TAPS, PACKED)
    gate = tl.sigmoid(total)
    gradient = tl.load(dy + place, mask=here, other=0.0).to(tl.float32) * gate * (1 + total * (1 - gate))
    tl.store(dpre + place, gradient, mask=here)
    own = parts + (row * tl.num_programs(1) + tl.program_id(1)) * (TAPS + 1) * d + c
    for back in tl.static_range(TAPS):
        seen = _inputs(x, history, seq_idx, t, back, c, row, length, d, TAPS, PACKED)
        tl.store(own + (TAPS - 1 - back) * d, tl.sum(gradient * seen, axis=0), mask=c < d)
    tl.store(own + TAPS * d, tl.sum(gradient, axis=0), mask=c < d)


@triton.jit
def _spread(
    dpre, weight, seq_idx, dx, dhistory, length, d,
    TAPS: tl.constexpr, PACKED: tl.constexpr, LENGTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of x and, at positions before 0, of the history, which belongs to the sequence of position 0."""
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * LENGTH + tl.arange(0, LENGTH) - (TAPS - 1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = (c < d)[None, :]
    total = tl.zeros((LENGTH, CHANNELS), tl.float32)
    for back in tl.static_range(TAPS):
        at = t + back
        counts = (at >= 0) & (at < length)
        tap = tl.load(weight + c * TAPS + (TAPS - 1 - back), mask=c < d, other=0.0).to(tl.float32)
        if PACKED:
            own = tl.load(seq_idx + row * length + tl.minimum(tl.maximum(t, 0), length - 1))
            theirs = tl.load(seq_idx + row * length + at, mask=counts, other=0)
            counts = counts & (own == theirs)
        place = (row * length + at)[:, None] * d + c[None, :]
        total += tl.load(dpre + place, mask=counts[:, None] & known, other=0.0) * tap[None, :]
    inside, before = (t >= 0) & (t < length), t < 0
    place = (row * length + t)[:, None] * d + c[None, :]
    tl.store(dx + place, total.to(dx.dtype.element_ty), mask=inside[:, None] & known)
    place = (row * (TAPS - 1) + t + TAPS - 1)[:, None] * d + c[None, :]
    tl.store(dhistory + place, total.to(dhistory.dtype.element_ty), mask=before[:, None] & known)
