"""What every connector is, the two multilayer perceptrons that they are made of, and their first weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Grids = tuple[int, int] | Sequence[tuple[int, int]]
"""Height and width of every image's grid; or of each image's own, of images that stand one after another in one row."""


class Connector(nn.Module):
    """Maps vision features (b, h * w, d_v) on a grid (h, w) to language embeddings (b, M, d).

    A subclass takes (width, out, config): d_v, d and a ConnectorConfig. M is h * w unless it overrides `grid_out`,
    which needs no instance: the number of placeholders is asked for before any weights exist. Images at their own size
    come in one row (1, sum of h * w, d_v), with a list of their grids.

    Attributes:
        pool: side in cells of what becomes one token, rounded up at the edge.
    """

    pool = 1

    @classmethod
    def grid_out(cls, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for those of the input."""
        return -(-grid[0] // cls.pool), -(-grid[1] // cls.pool)

    @classmethod
    def tokens(cls, grid: tuple[int, int]) -> int:
        """M: how many embeddings one image becomes."""
        height, width = cls.grid_out(grid)
        return height * width

    def forward(self, features: Tensor, grid: Grids) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def balance(self, rms: float) -> None:
        """Draw first weights of the projector under which images stay apart; see `balance` below."""
        balance(self.projector, rms)


class MLP(nn.Sequential):
    """Three linear layers with GELU between: width -> hidden -> out -> out."""

    def __init__(self, width: int, out: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out), nn.GELU(), nn.Linear(out, out))


class TwoLayerMLP(nn.Sequential):
    """Two linear layers with GELU between: width -> hidden -> out."""

    def __init__(self, width: int, out: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


@torch.no_grad()
def balance(projector: nn.Sequential, rms: float) -> None:
    """Give a projector first weights under which images stay apart.

    As torch draws them, biases and the positive mean of GELU add the same vector to every image's embeddings, at each
    layer anew: on the quickstart's features 35% of the energy differs between images, behind `mlp` 19%. Here biases are
    zero, weights keep the size of what passes (He et al. 2015), and each row behind a GELU sums to zero, which takes
    the common part out: behind `mlp` 52% differs.

    Args:
        projector: an MLP or TwoLayerMLP.
        rms: root mean square of its output, for an input of unit size: that of the language model's embeddings.
    """
    linears = [layer for layer in projector if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(linears):
        nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
        nn.init.zeros_(layer.bias)
        if number:
            layer.weight -= layer.weight.mean(1, keepdim=True)
    size = projector(torch.randn(256, linears[0].in_features)).square().mean().sqrt()
    linears[-1].weight *= rms / size
