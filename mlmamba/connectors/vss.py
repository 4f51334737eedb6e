"""VL-Mamba's MultiModal Connectors with a visual selective scan (VL-Mamba section 3.2), with Mamba-2.

VL-Mamba scans with one Mamba-1 layer, published no widths and never released its code. Here the scan is the Mamba-2
MVSS that ML-Mamba's connectors use, so that a comparison is one of connector shapes, and widths are those of the
language model unless the config says otherwise.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from mlmamba.connectors.base import Connector, Grids, TwoLayerMLP
from mlmamba.connectors.scan import VisualScanMixer


class VSSMLPConnector(Connector):
    """ "vss_mlp": MLP(Norm(VSS(V) + V)), the scan at the width of the vision features, a two-layer MLP.

    The MLP's hidden layer has the language width, or `config.hidden_size`.
    """

    def __init__(self, width: int, out: int, config):
        super().__init__()
        self.mixer = VisualScanMixer.of(width, config)
        self.norm = nn.LayerNorm(width)
        self.projector = TwoLayerMLP(width, out, config.hidden_size or out)

    def forward(self, features: Tensor, grid: Grids) -> Tensor:
        return self.projector(self.norm(self.mixer(features, grid) + features))


class VSSL2Connector(Connector):
    """ "vss_l2", VL-Mamba's final one: V' = Linear(V); Linear(Norm(VSS(GELU(V')) + V')).

    V' has the language width, or `config.hidden_size`.
    """

    def __init__(self, width: int, out: int, config):
        super().__init__()
        inner = config.hidden_size or out
        self.linear_in = nn.Linear(width, inner)
        self.mixer = VisualScanMixer.of(inner, config)
        self.norm = nn.LayerNorm(inner)
        self.linear_out = nn.Linear(inner, out)

    def forward(self, features: Tensor, grid: Grids) -> Tensor:
        h = self.linear_in(features)
        return self.linear_out(self.norm(self.mixer(F.gelu(h), grid) + h))
