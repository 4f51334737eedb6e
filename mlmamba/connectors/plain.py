"""Connectors without a scan: each patch by itself, or pooled with its neighbours."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlmamba.connectors.base import MLP, Connector, Grids, TwoLayerMLP


class MLPConnector(Connector):
    """ "mlp", ML-Mamba's baseline (equation 6), and "fused_mlp", Cobra's connector: one and the same module.

    ML-Mamba's paper says three layers and no widths; its code takes over Cobra's: hidden layer four times the fused
    vision features, 2176 -> 8704 -> 2560 -> 2560, 47.8M parameters.
    """

    def __init__(self, width: int, out: int, config):
        super().__init__()
        self.projector = MLP(width, out, config.hidden_size or 4 * width)

    def forward(self, features: Tensor, grid: Grids) -> Tensor:
        return self.projector(features)


class VLMLPConnector(Connector):
    """ "vl_mlp", VL-Mamba's baseline (section 3.2): two layers.

    The paper gives no widths and its code was never released; the hidden layer has the language width, as in LLaVA-1.5,
    whose recipe VL-Mamba follows.
    """

    def __init__(self, width: int, out: int, config):
        super().__init__()
        self.projector = TwoLayerMLP(width, out, config.hidden_size or out)

    def forward(self, features: Tensor, grid: Grids) -> Tensor:
        return self.projector(features)


class LDPv2Connector(Connector):
    """ "ldpv2", MobileVLM v2's downsampling projector as Cobra uses it: a quarter of the tokens.

    Two linear layers, average pooling to half the grid (odd sides round up: 27 x 27 becomes 14 x 14, 729 tokens 196),
    then a depthwise 3 x 3 convolution added to its input, which tells places apart. Windows of the pooling overlap
    where a side is odd, as in Cobra. Default hidden width: four times the input, Cobra's for two fused encoders;
    MobileVLM v2, with one encoder, has the language width there (set `hidden_size` to it).
    """

    pool = 2

    def __init__(self, width: int, out: int, config):
        super().__init__()
        self.projector = TwoLayerMLP(width, out, config.hidden_size or 4 * width)
        self.peg = nn.Conv2d(out, out, 3, padding=1, groups=out)

    def balance(self, rms: float) -> None:
        super().balance(rms)
        nn.init.zeros_(self.peg.bias)

    def forward(self, features: Tensor, grid: Grids) -> Tensor:
        """(b, h * w, width) -> (b, ceil(h / 2) * ceil(w / 2), out)."""
        h = self.projector(features).transpose(1, 2)
        if isinstance(grid, tuple):
            h = F.adaptive_avg_pool2d(h.unflatten(-1, grid), self.grid_out(grid))
            return (h + self.peg(h)).flatten(2).transpose(1, 2)
        # Each image on a field of zeros, as the convolution has them around it: one convolution for all.
        parts = h[0].split([height * width for height, width in grid], dim=-1)
        maps = [F.adaptive_avg_pool2d(x.unflatten(-1, g), self.grid_out(g)) for x, g in zip(parts, grid, strict=True)]
        high, wide = (max(x.shape[side] for x in maps) for side in (1, 2))
        h = torch.stack([F.pad(x, (0, wide - x.shape[2], 0, high - x.shape[1])) for x in maps])
        h = h + self.peg(h)
        own = [x[:, : m.shape[1], : m.shape[2]].flatten(1) for x, m in zip(h, maps, strict=True)]
        return torch.cat(own, dim=-1).T[None]
