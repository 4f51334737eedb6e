"""The Mamba-2 visual selective scan, which ML-Mamba's and VL-Mamba's connectors share."""

from torch import Tensor, nn

from mlmamba.connectors.base import Grids
from mlmamba.scan2d import check_merge, merge, orders, orders_of
from mlmamba.selective_scan import RMSNorm, SelectiveScan


class VisualScanMixer(nn.Module):
    """Mamba-2 visual selective scan (MVSS): one scan per order, shared projections.

    in_proj, gated norm and out_proj are shared by all directions; each direction has its own convolution, A, D and dt
    bias (ML-Mamba figure 4 and the released Bidirectional_Mamba, after Vim's "v2"). Each direction is normalised
    before the merge, as in the released code.

    Raises:
        ValueError: `head_dim` does not divide the inner width, or there is no such scan or merge.
    """

    def __init__(
        self, width: int, scan: str, expand: int, head_dim: int, state: int, kernel: int, chunk: int, merge: str
    ):
        super().__init__()
        inner = expand * width
        if inner % head_dim:
            raise ValueError(f"scan width {expand} x {width} = {inner} is not a multiple of head_dim {head_dim}")
        heads = inner // head_dim
        self.scan_name, self.merge_name = scan, check_merge(merge)
        self.scans = nn.ModuleList(
            SelectiveScan(inner, heads, state, 1, kernel, chunk) for _ in range(len(orders(scan, 1, 1)))
        )
        first = self.scans[0]
        self.split = [inner, first.conv_dim, heads]
        self.in_proj = nn.Linear(width, sum(self.split), bias=False)
        self.norm = RMSNorm(inner, 1e-5)
        self.out_proj = nn.Linear(inner, width, bias=False)

    @classmethod
    def of(cls, width: int, config) -> "VisualScanMixer":
        """The scan that a ConnectorConfig describes, for features of this width."""
        return cls(
            width,
            scan=config.scan,
            expand=config.expand,
            head_dim=config.head_dim,
            state=config.state_size,
            kernel=config.conv_kernel,
            chunk=config.chunk_size,
            merge=config.merge,
        )

    def forward(self, x: Tensor, grid: Grids) -> Tensor:
        """(b, N, width) -> (b, N, width). No scan goes on from one image of a row into the next."""
        order, owners = (t if t is None else t.to(x.device) for t in orders_of(self.scan_name, grid))
        seq_idx = None if owners is None else owners.expand(len(x), -1)
        z, xBC, dt = self.in_proj(x).split(self.split, dim=-1)
        scanned = []
        for scan, permutation in zip(self.scans, order, strict=True):
            y, _ = scan.scan(
                xBC.index_select(1, permutation), dt.index_select(1, permutation), seq_idx=seq_idx, keep_state=False
            )
            scanned.append(self.norm(y, z.index_select(1, permutation)))
        return self.out_proj(merge(scanned, order, self.merge_name))
