"""Short depthwise causal convolution with SiLU, in plain torch on any device. Shapes are those of naive.py.

As few passes over memory as torch allows: one fused multiply-add per tap, in place, and a gradient written out.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `naive.causal_conv1d`. Differentiable once."""
    b, _, d = x.shape
    w = weight.shape[1]
    history = x.new_zeros(b, w - 1, d) if initial_state is None else initial_state.to(x.dtype)
    bias = x.new_zeros(d) if bias is None else bias.to(x.dtype)
    y = _ConvSiLU.apply(x, history, weight.to(x.dtype).t(), bias, seq_idx)
    return y, last_inputs(x, history, seq_idx)


def last_inputs(x: Tensor, history: Tensor, seq_idx: Tensor | None) -> Tensor:
    """The last w-1 inputs, those of an earlier sequence zeroed: x (b, l, d), history (b, w-1, d) -> (b, w-1, d)."""
    b, held, _ = history.shape
    first = max(0, x.shape[1] - held)
    tail = torch.cat([history, x[:, first:]], dim=1)[:, -held:] if held else history
    if seq_idx is not None:
        owner = torch.cat([seq_idx[:, :1].expand(b, held), seq_idx[:, first:]], dim=1)[:, -held:]
        tail = tail * (owner == seq_idx[:, -1:])[..., None]
    return tail


class _ConvSiLU(torch.autograd.Function):
    """x (b, l, d), history (b, w-1, d), weight (w, d), bias (d,), seq_idx (b, l) or None -> (b, l, d)."""

    @staticmethod
    def forward(ctx, x, history, weight, bias, seq_idx):
        pre = torch.addcmul(bias, x, weight[-1])
        for back in range(1, len(weight)):
            inner, outer, same, first = _reach(seq_idx, back, x.shape[1])
            tap = weight[-1 - back]
            pre[:, back:].addcmul_(_masked(x[:, inner], same), tap)
            pre[:, :back].addcmul_(_masked(history[:, outer], first), tap)
        if not any(ctx.needs_input_grad):
            return F.silu(pre, inplace=True)
        ctx.save_for_backward(x, history, weight, pre, seq_idx)
        return F.silu(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, history, weight, pre, seq_idx = ctx.saved_tensors
        dpre = torch.ops.aten.silu_backward(dy, pre)
        dx, dhistory, dweight = dpre * weight[-1], torch.zeros_like(history), torch.empty_like(weight)
        dweight[-1] = (dpre * x).sum((0, 1))
        for back in range(1, len(weight)):
            inner, outer, same, first = _reach(seq_idx, back, x.shape[1])
            tap = weight[-1 - back]
            later, early = _masked(dpre[:, back:], same), _masked(dpre[:, :back], first)
            dx[:, inner].addcmul_(later, tap)
            dhistory[:, outer].addcmul_(early, tap)
            dweight[-1 - back] = (later * x[:, inner]).sum((0, 1)) + (early * history[:, outer]).sum((0, 1))
        return dx, dhistory, dweight, dpre.sum((0, 1)), None


def _reach(seq_idx: Tensor | None, back: int, length: int) -> tuple[slice, slice, Tensor | None, Tensor | None]:
    """What the tap `back` positions ago sees: where in x from position `back` on, where in the history before that,
    and for both whether it is of the same sequence. The history belongs to the sequence of the first position."""
    first = min(back, length)
    history = slice(-back, None if first == back else first - back)
    if seq_idx is None:
        return slice(0, length - first), history, None, None
    same = seq_idx[:, back:] == seq_idx[:, : length - first]
    return slice(0, length - first), history, same, seq_idx[:, :first] == seq_idx[:, :1]


def _masked(t: Tensor, keep: Tensor | None) -> Tensor:
    return t if keep is None else t * keep[..., None]


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """One position of the convolution: x (b, d), state (b, w-1, d). With `in_place` the state may be
    written over, as in `ssd_step`."""
    window = torch.cat([state.to(x.dtype), x[:, None]], dim=1)
    y = (window * weight.to(x.dtype).T).sum(1)
    if bias is not None:
        y = y + bias.to(x.dtype)
    return F.silu(y), state.copy_(window[:, 1:]) if in_place else window[:, 1:]
