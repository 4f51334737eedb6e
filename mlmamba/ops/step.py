"""One token of a Mamba-2 block between its two projections: convolution, recurrence and gated norm, on states in place.

`Between` holds what a mixer's weights come to, computed once, and picks how a step runs: mamba_ssm's and
causal_conv1d's decoding kernels on a GPU, our C++ for this processor (compiled.py), or plain torch, which is what the
others are tested against. Shapes: b rows, d = e + 2gn channels, e inner width (heads x head dim), g
groups, n state size, w kernel width, s slots.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from mlmamba.ops.chunked import ssd_step
from mlmamba.ops.convolution import causal_conv1d_step


@dataclass
class Between:
    """The constants of one mixer."""

    taps: Tensor
    """(w, d), of the convolution, the newest input last."""
    bias: Tensor
    """(d,)"""
    A: Tensor
    """(h,) float32, negative."""
    dt_bias: Tensor
    D: Tensor
    """(h,) float32, both."""
    weight: Tensor
    """(e,), of the gated norm."""
    eps: float
    groups: int
    norm_groups: int
    state_size: int
    dt_limit: tuple[float, float]
    compiled: Callable[..., Tensor] | None = None
    """`block` of `compiled.operators`, where they are there."""
    kernels: Callable[..., Tensor] | None = None
    """`cuda.between`, where the kernels import."""
    sizes: tuple[int, int, int] = field(init=False)

    def __post_init__(self):
        self.sizes = (len(self.weight), len(self.bias), len(self.A))

    @classmethod
    def of(cls, mixer) -> "Between":
        """Of a `Mamba2Mixer`, whose weights must not change from then on."""
        with torch.no_grad():
            taps = mixer.conv1d.weight[:, 0].t().contiguous()
            bias = mixer.conv1d.bias
            return cls(
                taps,
                taps.new_zeros(taps.shape[1]) if bias is None else bias.detach(),
                -torch.exp(mixer.A_log.float()),
                mixer.dt_bias.detach().float(),
                mixer.D.detach().float(),
                mixer.norm.weight.detach(),
                mixer.norm.eps,
                mixer.groups,
                mixer.norm.groups,
                mixer.state_size,
                mixer.dt_limit,
            )

    @property
    def bytes(self) -> int:
        """Of one row's recurrent state."""
        return self.sizes[0] * self.state_size * 4

    @cached_property
    def constants(self) -> tuple:
        """What the compiled code takes beside the token and the states."""
        tensors = (self.taps, self.bias, self.A, self.dt_bias, self.D, self.weight)
        tensors = tuple(t.float().contiguous() for t in tensors)
        return *tensors, self.eps, self.groups, self.norm_groups, *self.dt_limit

    def __call__(self, zxBCdt: Tensor, conv: Tensor, ssm: Tensor, slots: Tensor | None = None) -> Tensor:
        """One token of each row.

        Args:
            zxBCdt: (b, e + d + h), what in_proj gives.
            conv: (s, w-1, d), the last inputs of the convolution; written over.
            ssm: (s, h, p, n) float32; written over.
            slots: (b,) int32, where each row's states lie; None when they are the first b.

        Returns:
            (b, e), what out_proj takes.
        """
        if self.kernels is not None:
            return self.kernels(self, zxBCdt, conv, ssm, slots)
        if slots is not None:  # without kernels that look them up themselves
            rows = conv.index_select(0, slots), ssm.index_select(0, slots)
            y = self(zxBCdt, *rows)
            conv.index_copy_(0, slots.long(), rows[0])
            ssm.index_copy_(0, slots.long(), rows[1])
            return y
        if self.compiled is not None and self._fits(zxBCdt, conv, ssm):
            return self.compiled(zxBCdt[:, None], conv, ssm, None, *self.constants)[:, 0]
        return self._plain(zxBCdt, conv, ssm)

    def read(self, zxBCdt: Tensor, conv: Tensor, ssm: Tensor, mask: Tensor | None) -> Tensor:
        """Several tokens of each row, one after the other, by the compiled code: (b, l, e + d + h) -> (b, l, e).

        Args:
            conv, ssm: as above, contiguous; written over.
            mask: (b, l) bool, True and then False at padding, or None.
        """
        lengths = None if mask is None else mask.sum(1)
        return self.compiled(zxBCdt.contiguous(), conv, ssm, lengths, *self.constants)

    def _fits(self, zxBCdt: Tensor, conv: Tensor, ssm: Tensor) -> bool:
        """Whether the tensors are of the kind that the compiled code takes, which refuses others."""
        same = zxBCdt.dtype == conv.dtype == self.taps.dtype
        return same and zxBCdt.is_contiguous() and conv.is_contiguous() and ssm.is_contiguous()

    def _plain(self, zxBCdt: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
        inner, shared = self.sizes[0], self.groups * self.state_size
        z, xBC, dt = zxBCdt.split(self.sizes, -1)
        out, _ = causal_conv1d_step(xBC, self.taps.t(), self.bias, conv, in_place=True)
        x, B, C = out.split([inner, shared, shared], -1)
        B, C = (t.unflatten(-1, (self.groups, -1)) for t in (B, C))
        dt = limited(F.softplus(dt.float() + self.dt_bias), self.dt_limit)
        y, _ = ssd_step(x.unflatten(-1, (len(self.A), -1)), dt, self.A, B, C, self.D, ssm, in_place=True)
        return gated_norm(y.flatten(1), z, self.weight, self.eps, self.norm_groups)


def limited(dt: Tensor, limit: tuple[float, float]) -> Tensor:
    """Step sizes within a config's `time_step_limit`."""
    return dt if limit == (0.0, math.inf) else dt.clamp(*limit)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """norm(y * silu(z)) over each of `groups` equal parts, in float32: (..., e) -> (..., e) in y's dtype."""
    gated = (y.float() * F.silu(z.float())).unflatten(-1, (groups, -1))
    return (F.rms_norm(gated, gated.shape[-1:], eps=eps).flatten(-2) * weight.float()).to(y.dtype)


def add_norm(y: Tensor, residual: Tensor | None, weight: Tensor, eps: float, wide: bool) -> tuple[Tensor, Tensor]:
    """The residual stream's norm, for the next mixer, and the stream: (..., d), (..., d) -> (..., d) in y's dtype,
    (..., d).

    Args:
        y: what the last mixer gave; or the embeddings, where `residual` is None.
        wide: keep the stream in float32.
    """
    stream = y if residual is None else residual + y
    stream = stream.float() if wide else stream
    return F.rms_norm(stream.float(), stream.shape[-1:], weight.float(), eps).to(y.dtype), stream
