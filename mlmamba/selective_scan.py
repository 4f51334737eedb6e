"""What the language model and the scan connectors share: the selective scan of one direction, and the norm.

Shapes: b batch, l length, e inner width (heads x head dim), g groups, n state size, w kernel width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlmamba import ops
from mlmamba.state import LayerState


class RMSNorm(nn.Module):
    """Root mean square norm over each of `groups` equal parts, in float32.

    With a gate: norm(x * silu(gate)), or norm(x) * silu(gate) where the norm comes `before_gate`.
    """

    def __init__(self, width: int, eps: float, groups: int = 1, before_gate: bool = False):
        super().__init__()
        self.before_gate = before_gate
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        dtype = x.dtype
        if self.before_gate and gate is not None:
            return (self.forward(x.float()) * F.silu(gate.float())).to(dtype)
        x = x.float()
        if gate is not None:
            x = x * F.silu(gate.float())
        if self.groups == 1:
            return F.rms_norm(x, x.shape[-1:], self.weight.float(), self.eps).to(dtype)
        parts = x.unflatten(-1, (self.groups, -1))
        x = F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        return (self.weight.float() * x).to(dtype)


class SelectiveScan(nn.Module):
    """Short convolution and state-space recurrence with one set of A, D and dt bias: the part with a direction.

    `Mamba2Mixer` is one of these between two projections; the 2-D scan of the connector holds one per scan order.
    """

    def __init__(
        self, inner: int, heads: int, state: int, groups: int, kernel: int, chunk: int, conv_bias: bool = True
    ):
        super().__init__()
        self.inner, self.heads, self.state_size, self.groups, self.chunk = inner, heads, state, groups, chunk
        self.conv_dim = inner + 2 * groups * state
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, kernel, groups=self.conv_dim, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(heads, dtype=torch.float32))
        self.dt_limit = (0.0, math.inf)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> None:
        """Initialise as state-spaces does: A uniform in 1..16, dt log-uniform in dt_min..dt_max, D one."""
        self.A_log.uniform_(1, 16).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=dt_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.D.fill_(1.0)

    def _apply(self, fn, recurse: bool = True):
        """Casts of the model to half precision (`model.bfloat16()`) leave A_log, dt_bias and D as they are."""
        own = (self.A_log, self.dt_bias, self.D)
        kept = {id(t) for t in (*own, *(p.grad for p in own))}

        def guarded(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if id(t) in kept and out.dtype in (torch.float16, torch.bfloat16) else out

        return super()._apply(guarded, recurse)

    def scan(
        self,
        xBC: Tensor,
        dt: Tensor,
        state: LayerState | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """Run xBC (b, l, e + 2gn) and raw dt (b, l, h) through convolution and recurrence.

        Given a state, padding stands at the end of a row (`Mamba2Backbone` sees to it): the convolution looks straight
        back into the state. Returns y (b, l, e) and the state after the last unmasked position of each row;
        None in its place without `keep_state`.
        """
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        A, D = -torch.exp(self.A_log.float()), self.D.float()
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if self.dt_limit != (0.0, math.inf):
            dt = dt.clamp(*self.dt_limit)

        if state is not None and xBC.shape[1] == 1 and mask is None:
            out, conv = ops.causal_conv1d_step(xBC[:, 0], weight, bias, state.conv, state.in_place)
            x, B, C = self._split(out)
            y, ssm = ops.ssd_step(x, dt[:, 0], A, B, C, D, state.ssm, state.in_place)
            return y.flatten(1)[:, None], LayerState(conv, ssm, state.in_place)

        if mask is not None:
            xBC, dt = xBC * mask[..., None], dt * mask[..., None]
        out, conv = ops.causal_conv1d(
            xBC, weight, bias, initial_state=None if state is None else state.conv, seq_idx=seq_idx
        )
        if mask is not None and keep_state:
            conv = self._last_inputs(xBC, state, mask, seq_idx)
        x, B, C = self._split(out)
        y, ssm = ops.ssd(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            initial_state=None if state is None else state.ssm,
            seq_idx=seq_idx,
            chunk_size=self.chunk,
            final_state=keep_state,
        )
        return y.flatten(2), LayerState(conv, ssm) if keep_state else None

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = xBC.split([self.inner, self.groups * self.state_size, self.groups * self.state_size], dim=-1)
        B, C = (t.unflatten(-1, (self.groups, self.state_size)) for t in (B, C))
        return x.unflatten(-1, (self.heads, -1)), B, C

    def _last_inputs(self, xBC: Tensor, state: LayerState | None, mask: Tensor, seq_idx: Tensor | None) -> Tensor:
        """The convolution's last w-1 inputs of each row, counted back from its last unmasked position."""
        w, length = self.conv1d.kernel_size[0], xBC.shape[1]
        history = xBC.new_zeros(len(xBC), w - 1, xBC.shape[2]) if state is None else state.conv.to(xBC.dtype)
        padded = torch.cat([history, xBC], dim=1)
        positions = torch.arange(1, length + 1, device=xBC.device)
        end = (positions * mask).amax(dim=1)  # 0 for a row of nothing but padding: it keeps its history
        index = end[:, None] + torch.arange(w - 1, device=xBC.device)
        last = padded.gather(1, index[..., None].expand(-1, -1, padded.shape[2]))
        if seq_idx is not None:  # inputs of an earlier sequence count as zero
            owner = torch.cat([seq_idx[:, :1].expand(-1, w - 1), seq_idx], dim=1)
            last = last * (owner.gather(1, index) == owner.gather(1, end[:, None] + w - 2))[..., None]
        return last
