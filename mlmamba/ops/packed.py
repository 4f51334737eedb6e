"""Linear layers of a model that only answers, on a CPU: weights in the form that is read fastest.

float32 and bfloat16 weights are packed once into the blocks that oneDNN computes with, which torch's own product would
do anew for each call or, in float32, not at all: 1.6 to 2.6 times the speed, from one row to a whole prompt. In int8
each output channel has a scale: for few rows our kernel (decoding.cpp, where it is compiled) or torch's, whose
activations are bfloat16, unpacks weights as it reads them, and for prompts the weights of a layer are unpacked first
(tests/benchmarks/measurements/linear_rows.py has rates).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKED = ("fp32", "bf16", "int8")
# Most rows for which int8 weights are unpacked while they are read, by torch's kernel and by ours.
_INT8_ROWS, _OUR_ROWS = 32, 64
# What torch's int8 kernel takes of inputs at once. It reads beyond the end of rows that are no multiple of it.
_INT8_STEP = 64


def packs() -> str:
    """Why this build of torch packs no weights, or ""."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    return "" if hasattr(torch.ops.mkldnn, "_linear_pointwise") else "this torch has no packed product of oneDNN"


def has_bf16() -> bool:
    """Whether the processor computes in bfloat16; where it does not, oneDNN converts back and forth."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(nn.Module):
    """What `torch.nn.Linear` computes, without gradients, from packed weights: it has no parameters.

    Args:
        linear: the layer, on the CPU. Its weights are copied.
        form: one of PACKED.

    Raises:
        ValueError: the form is none of PACKED.
    """

    def __init__(self, linear: nn.Linear, form: str):
        super().__init__()
        if form not in PACKED:
            raise ValueError(f"weights cannot be packed as {form!r}; expected one of {', '.join(PACKED)}")
        weight = linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        self.form, self.computes_in = form, weight.dtype if form == "int8" else _dtype(form)
        self._bias = None if linear.bias is None else linear.bias.detach().to(self.computes_in)
        self._scale: Tensor | None = None
        self._compiled: tuple[Callable[..., Tensor], Tensor] | None = None
        if form == "int8":
            self._weight, self._scale = quantized(weight)
        else:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.computes_in))

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o), in x's dtype."""
        if self._scale is None:
            y = torch.ops.mkldnn._linear_pointwise(x.to(self.computes_in), self._weight, self._bias, "none", [], "")
            return y.to(x.dtype)
        rows = x.reshape(-1, self.in_features)
        if self._compiled is not None and 0 < len(rows) <= _OUR_ROWS:
            compute, scale = self._compiled
            y = compute(rows.contiguous(), self._weight, scale)
        elif 0 < len(rows) <= _INT8_ROWS and self.in_features % _INT8_STEP == 0:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self._weight, self._scale)
        else:  # whole numbers up to 127 are exact in bfloat16
            wide = torch.bfloat16 if has_bf16() else torch.float32
            y = F.linear(rows.to(wide), self._weight.to(wide)) * self._scale
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self._bias is None else y + self._bias

    def use(self, int8_linear: Callable[..., Tensor]) -> None:
        """From now on int8 weights meet few rows in this operator of `compiled.operators`."""
        if self._scale is not None:
            self._compiled = int8_linear, self._scale.float()

    def dense(self) -> Tensor:
        """The weights (o, i), unpacked."""
        if self._scale is None:
            return self._weight.to_dense()
        return (self._weight.float() * self._scale.float()[:, None]).to(self.computes_in)

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


def _dtype(form: str) -> torch.dtype:
    return torch.bfloat16 if form == "bf16" else torch.float32


def _size(form: str) -> int:
    return _dtype(form).itemsize
