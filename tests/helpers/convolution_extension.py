"""A stand-in for causal_conv1d_cuda, the compiled part of causal_conv1d: what its C++ checks, then torch.

Everything else of causal_conv1d is real: its Python layer, its registered operators, its autograd function. Layouts are
its own: x (b, d, l), initial states (b, d, w-1), boundaries int32 (b, l), decoding states (slots, d, w or more).
"""

import sys
import types

import torch
from torch.nn import functional as F


def install() -> None:
    """Put the stand-in where causal_conv1d imports its extension from."""
    module = types.ModuleType("causal_conv1d_cuda")
    module.causal_conv1d_fwd, module.causal_conv1d_bwd, module.causal_conv1d_update = _forward, _backward, _update
    sys.modules["causal_conv1d_cuda"] = module


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"causal_conv1d_cuda: {what}")


def _check(x, weight, bias, seq_idx, initial, dout=None) -> None:
    (b, d, length), w = x.shape, weight.shape[1]
    channel_last = x.stride(1) == 1 and x.stride(2) > 1
    _need(x.stride(2) == 1 or x.stride(1) == 1, "layout of x")
    _need(2 <= w <= 4 and weight.shape[0] == d, "shape of weight")
    if channel_last:
        _need(d % 8 == 0, "channels are no multiple of 8")
        _need(x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0, f"strides {x.stride()} are no multiples of 8")
        _need(x.data_ptr() % 16 == 0, "x does not begin at 16 bytes")
    _need(bias is None or (bias.dtype == weight.dtype and bias.stride(0) == 1), "bias")
    if seq_idx is not None:
        _need(channel_last and seq_idx.is_contiguous(), "seq_idx")
        _need(seq_idx.dtype == torch.int32 and seq_idx.shape == (b, length), "dtype or shape of seq_idx")
    if initial is not None:
        _need(channel_last and initial.dtype == x.dtype and initial.stride(1) == 1, "initial_states")
        _need(initial.shape == (b, d, w - 1), "shape of initial_states")
    if dout is not None and channel_last and dout.stride(1) == 1:
        _need(dout.stride(0) % 8 == 0 and dout.stride(2) % 8 == 0, "strides of dout")


def _windows(x, weight, seq_idx, initial):
    """Padded input (b, d, w-1+l), and which taps count (b, l, w), or None for all."""
    w = weight.shape[1]
    start = x.new_zeros(*x.shape[:2], w - 1) if initial is None else initial
    full = torch.cat([start, x], 2).float()
    if seq_idx is None:
        return full, None
    before = seq_idx[:, :1] if initial is not None else torch.full_like(seq_idx[:, :1], -1)
    owner = torch.cat([before.expand(-1, w - 1), seq_idx], 1).unfold(1, w, 1)
    return full, owner == seq_idx[..., None]


def _convolve(x, weight, bias, seq_idx, initial):
    full, counts = _windows(x, weight, seq_idx, initial)
    taps = full.unfold(2, weight.shape[1], 1)
    taps = taps if counts is None else taps * counts[:, None]
    y = (taps * weight.float()[:, None]).sum(-1)
    return y if bias is None else y + bias.float()[:, None]


def _forward(x, weight, bias, seq_idx, initial, out, final, silu) -> None:
    _check(x, weight, bias, seq_idx, initial)
    y = _convolve(x, weight, bias, seq_idx, initial)
    out.copy_(F.silu(y) if silu else y)
    if final is not None:
        final.copy_(_windows(x, weight, None, initial)[0][:, :, 1 - weight.shape[1] :])


def _backward(x, weight, bias, dout, seq_idx, initial, dfinal, dx, dweight, dbias, dinitial, silu) -> None:
    _check(x, weight, bias, seq_idx, initial, dout)
    length, w = x.shape[2], weight.shape[1]
    y, dy = _convolve(x, weight, bias, seq_idx, initial), dout.float()
    if silu:
        dy = dy * torch.sigmoid(y) * (1 + y * (1 - torch.sigmoid(y)))
    full, counts = _windows(x, weight, seq_idx, initial)
    dfull = torch.zeros_like(full)
    for tap in range(w):
        own = dy if counts is None else dy * counts[:, None, :, tap]
        dfull[:, :, tap : tap + length] += own * weight.float()[:, tap, None]
        dweight[:, tap] = (own * full[:, :, tap : tap + length]).sum((0, 2))
    if dfinal is not None:
        dfull[:, :, 1 - w :] += dfinal.float()
    dx.copy_(dfull[:, :, w - 1 :])
    if dbias is not None:
        dbias.copy_(dy.sum((0, 2)))
    if dinitial is not None:
        dinitial.copy_(dfull[:, :, : w - 1])


def _update(x, state, weight, bias, out, silu, cache_seqlens, indices) -> None:
    _need(cache_seqlens is None, "circular states are not stood in for")
    rows = slice(None) if indices is None else indices.long()
    full = torch.cat([state[rows], x], 2)
    y = (full.float().unfold(2, weight.shape[1], 1) * weight.float()[:, None]).sum(-1)[:, :, -x.shape[2] :]
    y = y if bias is None else y + bias.float()[:, None]
    out.copy_(F.silu(y) if silu else y)
    state[rows] = full[:, :, -state.shape[2] :]
