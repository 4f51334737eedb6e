"""Linear layer for decoding on a CPU, where one to four rows meet a weight matrix that must be read from memory.

For so few rows torch's CPU matrix product reads the weights at a fifth to a half of the memory's rate. The transposed
product, weight times columns, comes closer to that rate from two columns on, so a single row is taken twice
(tests/benchmarks/measurements/linear_rows.py prints the rates). A model that only answers has packed.py instead.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, faster for few rows on a CPU in float32 without
    gradients; same values but rounding.

    Args:
        x: (..., i).
        weight: (o, i).
        bias: (o,) or None.
    """
    rows = x.numel() // x.shape[-1]
    if rows > FEW_ROWS or not rows or not _applies(x, weight):
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1)
    columns = torch.cat([columns, columns]) if rows == 1 else columns.contiguous()
    y = (weight @ columns.t()).t()[:rows]
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """`torch.nn.Linear` that runs through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _applies(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
