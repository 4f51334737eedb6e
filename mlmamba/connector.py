"""Connectors: from fused vision features (b, N, d_v) on a grid to language embeddings (b, N, d).

Each class carries the name its paper gives it; `CONNECTORS` maps recipe names to classes and is where a new one is
added. A connector's forward takes the features and the grid (height, width), N = height * width.

- "mlp": three-layer MLP, ML-Mamba equation 6.
- "msc_basic": Mamba-2 Scan Connector without SwiGLU, equation 7.
- "msc_advanced": MSC with SwiGLU, equation 8; the paper's final model.

Paper and released code differ (paper.md 2.2 lists how). `layout` chooses: "paper" (default) puts the scan straight on
the vision features, one block, as the equations say; "released" first projects to the language width and stacks two
residual blocks with a final norm, as the published weights need. Where the equations leave open what only the figures
and the code show, this follows the code: residual connections around mixer and SwiGLU, and the mean as the merge.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from mlmamba.mamba2 import RMSNorm, SelectiveScan
from mlmamba.scan2d import merge, orders


class MLP(nn.Sequential):
    """Three linear layers with GELU between: width -> hidden -> out -> out."""

    def __init__(self, width: int, out: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out), nn.GELU(), nn.Linear(out, out))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), all of the same width and with bias, as the released code has it."""

    def __init__(self, width: int):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class VisualScanMixer(nn.Module):
    """Mamba-2 visual selective scan (MVSS): one scan per order, shared projections.

    in_proj, gated norm and out_proj are shared by all directions; each direction has its own convolution, A, D and dt
    bias (ML-Mamba figure 4 and the released Bidirectional_Mamba, after Vim's "v2"). Each direction is normalised
    before the merge, as in the released code.
    """

    def __init__(self, width: int, scan: str, expand: int, head_dim: int, state: int, kernel: int, chunk: int):
        super().__init__()
        inner = expand * width
        if inner % head_dim:
            raise ValueError(f"scan width {expand} x {width} = {inner} is not a multiple of head_dim {head_dim}")
        heads = inner // head_dim
        self.scan_name = scan
        self.scans = nn.ModuleList(
            SelectiveScan(inner, heads, state, 1, kernel, chunk) for _ in range(len(orders(scan, 1, 1)))
        )
        first = self.scans[0]
        self.split = [inner, first.conv_dim, heads]
        self.in_proj = nn.Linear(width, sum(self.split), bias=False)
        self.norm = RMSNorm(inner, 1e-5)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, N, width) -> (b, N, width)."""
        order = orders(self.scan_name, *grid).to(x.device)
        z, xBC, dt = self.in_proj(x).split(self.split, dim=-1)
        scanned = []
        for scan, permutation in zip(self.scans, order, strict=True):
            y, _ = scan.scan(xBC.index_select(1, permutation), dt.index_select(1, permutation))
            scanned.append(self.norm(y, z.index_select(1, permutation)))
        return self.out_proj(merge(scanned, order))


class ScanBlock(nn.Module):
    """h + MVSS(h), then, in the advanced variant, h + SwiGLU(LayerNorm(h))."""

    def __init__(self, width: int, swiglu: bool, **scan_options):
        super().__init__()
        self.mixer = VisualScanMixer(width, **scan_options)
        self.norm = nn.LayerNorm(width) if swiglu else None
        self.mlp = SwiGLU(width) if swiglu else None

    def forward(self, h: Tensor, grid: tuple[int, int]) -> Tensor:
        h = h + self.mixer(h, grid)
        return h if self.mlp is None else h + self.mlp(self.norm(h))


class MLPConnector(nn.Module):
    """ML-Mamba's baseline, equation 6: no scan."""

    def __init__(self, width: int, out: int, config):
        super().__init__()
        self.projector = MLP(width, out, config.hidden_size or 4 * width)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.projector(features)


class MambaScanConnector(nn.Module):
    """Mamba-2 Scan Connector followed by the MLP projector, equations 7 and 8."""

    def __init__(self, width: int, out: int, config, swiglu: bool):
        super().__init__()
        released = config.layout == "released"
        self.mlp = nn.Sequential(nn.Linear(width, out), nn.GELU()) if released else None
        inner = out if released else width
        options = {
            "scan": config.scan,
            "expand": config.expand,
            "head_dim": config.head_dim,
            "state": config.state_size,
            "kernel": config.conv_kernel,
            "chunk": config.chunk_size,
        }
        self.layers = nn.ModuleList(ScanBlock(inner, swiglu, **options) for _ in range(2 if released else 1))
        self.norm_f = nn.LayerNorm(inner)
        self.projector = MLP(inner, out, config.hidden_size or 4 * inner)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        h = features if self.mlp is None else self.mlp(features)
        for layer in self.layers:
            h = layer(h, grid)
        return self.projector(self.norm_f(h))


CONNECTORS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLPConnector,
    "msc_basic": lambda width, out, config: MambaScanConnector(width, out, config, swiglu=False),
    "msc_advanced": lambda width, out, config: MambaScanConnector(width, out, config, swiglu=True),
}


def build_connector(width: int, out: int, config) -> nn.Module:
    """Connector named by `config.name` from vision width to language width.

    Raises:
        ValueError: unknown name.
    """
    if config.name not in CONNECTORS:
        raise ValueError(f"unknown connector {config.name!r}; choose one of {', '.join(CONNECTORS)}")
    return CONNECTORS[config.name](width, out, config)
