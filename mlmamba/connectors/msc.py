"""ML-Mamba's Mamba-2 Scan Connector (MSC): visual selective scan, SwiGLU in the advanced variant, MLP projector."""

from torch import Tensor, nn
from torch.nn import functional as F

from mlmamba.connectors.base import MLP, Connector, Grids
from mlmamba.connectors.scan import VisualScanMixer

LAYOUTS = ("paper", "released")


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), all of the same width and with bias, as the released code has it."""

    def __init__(self, width: int):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class ScanBlock(nn.Module):
    """h + MVSS(h), then, in the advanced variant, h + SwiGLU(LayerNorm(h))."""

    def __init__(self, width: int, swiglu: bool, config):
        super().__init__()
        self.mixer = VisualScanMixer.of(width, config)
        self.norm = nn.LayerNorm(width) if swiglu else None
        self.mlp = SwiGLU(width) if swiglu else None

    def forward(self, h: Tensor, grid: Grids) -> Tensor:
        h = h + self.mixer(h, grid)
        return h if self.mlp is None else h + self.mlp(self.norm(h))


class MSCBasic(Connector):
    """ "msc_basic" (equation 7): the scan, then the three-layer MLP.

    `layout` "paper" (default) follows the equations: one block, straight on the vision features. "released" is what
    the published weights need: a linear layer with GELU to the language width first, then two blocks.

    Raises:
        ValueError: `config.layout` is neither.
    """

    swiglu = False

    def __init__(self, width: int, out: int, config):
        super().__init__()
        if config.layout not in LAYOUTS:
            raise ValueError(f"unknown connector layout {config.layout!r}; choose one of {', '.join(LAYOUTS)}")
        released = config.layout == "released"
        self.mlp = nn.Sequential(nn.Linear(width, out), nn.GELU()) if released else None
        inner = out if released else width
        self.layers = nn.ModuleList(ScanBlock(inner, self.swiglu, config) for _ in range(2 if released else 1))
        self.norm_f = nn.LayerNorm(inner)
        self.projector = MLP(inner, out, config.hidden_size or 4 * inner)

    def forward(self, features: Tensor, grid: Grids) -> Tensor:
        h = features if self.mlp is None else self.mlp(features)
        for layer in self.layers:
            h = layer(h, grid)
        return self.projector(self.norm_f(h))


class MSCAdvanced(MSCBasic):
    """ "msc_advanced" (equation 8): with SwiGLU after the scan; ML-Mamba's final model."""

    swiglu = True
