"""What every connector is, and the two multilayer perceptrons that they are made of."""

from torch import Tensor, nn


class Connector(nn.Module):
    """Maps vision features (b, h * w, d_v) on a grid (h, w) to language embeddings (b, M, d).

    A subclass takes (width, out, config): d_v, d and a ConnectorConfig. M is h * w unless it overrides `grid_out`,
    which needs no instance: the number of placeholders is asked for before any weights exist.
    """

    @classmethod
    def grid_out(cls, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for those of the input."""
        return grid

    @classmethod
    def tokens(cls, grid: tuple[int, int]) -> int:
        """M: how many embeddings one image becomes."""
        height, width = cls.grid_out(grid)
        return height * width

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no forward")


class MLP(nn.Sequential):
    """Three linear layers with GELU between: width -> hidden -> out -> out."""

    def __init__(self, width: int, out: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out), nn.GELU(), nn.Linear(out, out))


class TwoLayerMLP(nn.Sequential):
    """Two linear layers with GELU between: width -> hidden -> out."""

    def __init__(self, width: int, out: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))
