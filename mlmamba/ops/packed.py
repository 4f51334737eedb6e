"""Linear layers of a model that only answers, on a CPU: weights in the form that is read fastest.

float32 and bfloat16 weights are packed once: into panels that our kernel (products.h, where it is compiled) reads
from one end to the other, or into the blocks that oneDNN computes with, which torch's own product would make anew for
each call or, in float32, not at all. In int8 each output channel has a scale: for few rows our kernel or torch's, whose
activations are bfloat16, unpacks weights as it reads them, and for prompts the weights of a layer are unpacked first
(tests/benchmarks/measurements/linear_rows.py has rates).

Our kernel gives a row the same bits whatever rows stand beside it; oneDNN and torch choose an order of sums by their
number.
"""

import mmap
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKED = ("fp32", "bf16", "int8")
# Most rows for which int8 weights are unpacked while they are read, by torch's kernel and by ours.
_INT8_ROWS, _OUR_ROWS = 32, 64
# What torch's int8 kernel takes of inputs at once. It reads beyond the end of rows that are no multiple of it.
_INT8_STEP = 64
_LARGE = 2**21  # bytes of a large page, where they have one size, as on x86
_PANEL = 64  # outputs that lie side by side; products.h has the same number


def packs() -> str:
    """Why this build of torch packs no weights, or ""."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    return "" if hasattr(torch.ops.mkldnn, "_linear_pointwise") else "this torch has no packed product of oneDNN"


def has_bf16() -> bool:
    """Whether the processor computes in bfloat16; where it does not, oneDNN converts back and forth."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX), which oneDNN uses and our kernel does not."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


class PackedLinear(nn.Module):
    """What `torch.nn.Linear` computes, without gradients, from packed weights: it has no parameters.

    Args:
        linear: the layer, on the CPU. Its weights are copied.
        form: one of PACKED.
        own: `compiled.operators`, for which float32 and bfloat16 weights are then laid out; None for oneDNN.

    Raises:
        ValueError: the form is none of PACKED.
    """

    def __init__(self, linear: nn.Linear, form: str, own: Any = None):
        super().__init__()
        if form not in PACKED:
            raise ValueError(f"weights cannot be packed as {form!r}; expected one of {', '.join(PACKED)}")
        weight = linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        self.form, self.computes_in = form, weight.dtype if form == "int8" else _dtype(form)
        self._bias = None if linear.bias is None else linear.bias.detach().to(self.computes_in)
        self._scale: Tensor | None = None
        self._product: Callable[..., Tensor] | None = None
        self._most = _OUR_ROWS
        if form == "int8":
            self._weight, self._scale = quantized(weight)
            self._weight = in_large_pages(self._weight)
            if own is not None:
                self.use(own)
        elif own is not None:
            self._weight, self._product = in_large_pages(panels(weight.to(self.computes_in))), own.linear
        else:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.computes_in))

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o), in x's dtype."""
        if self._scale is None:
            return self._whole(x)
        rows = x.reshape(-1, self.in_features)
        if self._product is not None and 0 < len(rows) <= self._most:
            y = self._product(rows.contiguous(), self._weight, self._scale)
        elif 0 < len(rows) <= _INT8_ROWS and self.in_features % _INT8_STEP == 0:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self._weight, self._scale.bfloat16())
        else:  # whole numbers up to 127 are exact in bfloat16
            wide = torch.bfloat16 if has_bf16() else torch.float32
            y = F.linear(rows.to(wide), self._weight.to(wide)) * self._scale
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self._bias is None else y + self._bias

    def _whole(self, x: Tensor) -> Tensor:
        """`forward` with weights in float32 or bfloat16."""
        given = x.to(self.computes_in)
        if self._product is None:
            return torch.ops.mkldnn._linear_pointwise(given, self._weight, self._bias, "none", [], "").to(x.dtype)
        rows = given.reshape(-1, self.in_features)
        if spare := self._weight.shape[1] * self._weight.shape[3] - self.in_features:
            rows = F.pad(rows, (0, spare))
        y = self._product(rows.contiguous(), self._weight, self.out_features)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return (y if self._bias is None else y + self._bias).to(x.dtype)

    def use(self, own: Any, always: bool = False) -> None:
        """From now on int8 weights meet few rows, or all, in the product of `compiled.operators`."""
        if self._scale is not None:
            self._product, self._scale = own.int8_linear, self._scale.float()
            self._most = sys.maxsize if always else _OUR_ROWS

    def dense(self) -> Tensor:
        """The weights (o, i), unpacked."""
        if self._scale is not None:
            return (self._weight.float() * self._scale.float()[:, None]).to(self.computes_in)
        if self._product is None:
            return self._weight.to_dense()
        whole = self._weight.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        return whole[: self.out_features, : self.in_features].contiguous()

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        scale = 0 if self._scale is None else self._scale.nbytes
        return scale + self.out_features * self.in_features * (1 if self._scale is not None else _size(self.form))

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        destination[prefix + "weight"] = self.dense()
        if self._bias is not None:
            destination[prefix + "bias"] = self._bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form}"


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(o, i) -> int8 (o, i) and the scale of each output channel (o,) in bfloat16, that the kernel takes.

    The scale is rounded up before it divides, so that its own rounding is no error and nothing is over 127.
    """
    most = weight.float().abs().amax(1)
    scale = (most / 127 * (1 + 2**-8)).bfloat16()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    steps = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return steps.to(torch.int8).contiguous(), scale


def panels(weight: Tensor) -> Tensor:
    """Weights (o, i) as our kernel reads them: (panels, i / s, 64, s), s inputs at once, then zeros."""
    step = 2 if weight.dtype == torch.bfloat16 else 1
    outs, ins = weight.shape
    whole = F.pad(weight, (0, -ins % step, 0, -outs % _PANEL))
    return whole.unflatten(0, (-1, _PANEL)).unflatten(2, (-1, step)).transpose(1, 2).contiguous()


def in_large_pages(t: Tensor) -> Tensor:
    """A copy in memory whose pages are large where the system has such: a processor that reads all weights for a token
    else spends a quarter of the time on looking up where pages are. Small tensors, and others, as they are."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or t.nbytes < _LARGE:
        return t
    try:
        room = mmap.mmap(-1, t.nbytes + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(room, dtype=torch.uint8)
        first = -whole.data_ptr() % _LARGE
        room.madvise(mmap.MADV_HUGEPAGE, first, t.nbytes // _LARGE * _LARGE)
    except OSError:  # a kernel without them, or without memory for a second copy
        return t
    return whole[first : first + t.nbytes].view(t.dtype).view(t.shape).copy_(t)


def _dtype(form: str) -> torch.dtype:
    return torch.bfloat16 if form == "bf16" else torch.float32


def _size(form: str) -> int:
    return _dtype(form).itemsize
