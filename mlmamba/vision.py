"""Vision encoders from timm, one or several, fused on channels (ML-Mamba equation 5).

Pictures come as uint8 (n, 3, s, s); every tower normalises them with its own mean and standard deviation, so one batch
serves towers of different families. Prefix tokens (class, registers) are dropped. All towers must give one grid.
"""

import json
import math
from functools import lru_cache
from pathlib import Path

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from mlmamba.configuration import VisionConfig


class VisionTower(nn.Module):
    """One timm model. forward: uint8 (n, 3, s, s) -> (n, N, channels)."""

    def __init__(self, spec: dict, image_size: int, grid: int | None):
        super().__init__()
        spec = dict(spec)
        name = spec.pop("model")
        self.stages, self.block = spec.pop("stages", None), spec.pop("block", None)
        if spec:
            raise ValueError(f"vision tower {name!r} has unknown keys {sorted(spec)}; known: model, stages, block")
        if (self.stages is None) == (self.block is None):
            raise ValueError(f"vision tower {name!r} needs either `block` (patch tokens) or `stages` (feature maps)")
        if self.stages is None:
            if grid is not None:
                raise ValueError(
                    f"vision tower {name!r} gives patch tokens, whose number fixes the grid: set grid: null"
                )
            self.model = timm.create_model(name, num_classes=0, img_size=image_size)
            if not -len(self.model.blocks) <= self.block < len(self.model.blocks):
                raise ValueError(f"vision tower {name!r} has {len(self.model.blocks)} blocks, there is no {self.block}")
            self.channels = self.model.num_features
            self.grid = tuple(self.model.patch_embed.grid_size)
        else:
            if grid is None:
                raise ValueError(f"vision tower {name!r} gives feature maps: set vision.grid to the side in cells")
            self.model = timm.create_model(name, features_only=True, out_indices=self.stages)
            self.channels = sum(self.model.feature_info.channels())
            self.grid = (grid, grid)
        data = timm.data.resolve_data_config({}, model=self.model)
        self.mean, self.std = data["mean"], data["std"]

    def forward(self, pixels: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        mean, std = (weight.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        x = (pixels.to(weight.dtype) / 255 - mean) / std
        if self.stages is None:
            (tokens,) = self.model.forward_intermediates(
                x, indices=[self.block], output_fmt="NLC", intermediates_only=True, stop_early=True
            )
            return tokens
        maps = [_normalise(_resize(m, self.grid)) for m in self.model(x)]
        even = [m * math.sqrt(self.channels / (len(maps) * m.shape[1])) for m in maps]
        return torch.cat(even, dim=1).flatten(2).transpose(1, 2)


class VisionEncoder(nn.Module):
    """All towers of a VisionConfig. forward: uint8 (n, 3, s, s) -> (n, N, sum of channels)."""

    def __init__(self, config):
        super().__init__()
        if not config.towers:
            raise ValueError("vision.towers is empty: name at least one timm model")
        self.towers = nn.ModuleList(VisionTower(spec, config.image_size, config.grid) for spec in config.towers)
        grids = {tower.grid for tower in self.towers}
        if len(grids) > 1:
            names = [spec["model"] for spec in config.towers]
            raise ValueError(f"towers {names} give different grids {sorted(grids)}; fusing on channels needs one grid")
        self.grid = self.towers[0].grid
        self.channels = sum(tower.channels for tower in self.towers)
        self.image_size = config.image_size

    def forward(self, pixels: Tensor) -> Tensor:
        size = (3, self.image_size, self.image_size)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != size:
            raise ValueError(
                f"pictures are {pixels.dtype} {tuple(pixels.shape)}; expected uint8 (n, {', '.join(map(str, size))})"
            )
        return torch.cat([tower(pixels) for tower in self.towers], dim=-1)


@lru_cache
def _measure(towers: str, image_size: int, grid: int | None) -> tuple[int, tuple[int, int]]:
    with torch.device("meta"):
        encoder = VisionEncoder(VisionConfig(towers=json.loads(towers), image_size=image_size, grid=grid))
    return encoder.channels, encoder.grid


def measure(config) -> tuple[int, tuple[int, int]]:
    """Channels and grid (height, width) of a VisionConfig, without allocating weights."""
    return _measure(json.dumps(config.towers), config.image_size, config.grid)


def tokens_per_image(config) -> int:
    """Number of feature vectors, and so of placeholders, that one picture takes."""
    height, width = measure(config)[1]
    return height * width


def load_tower_weights(tower: VisionTower, name: str, weights: str) -> None:
    """Put pretrained weights into a tower, strictly.

    Args:
        name: the timm model name.
        weights: "hub" to let timm fetch them, or a safetensors or torch checkpoint file in timm's key layout or in
            that of the lukemelas EfficientNet packages. Position embeddings are resampled to the tower's grid.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: keys that the tower needs are missing from the file.
    """
    if weights == "hub":
        full = timm.create_model(name, pretrained=True)
        state = full.state_dict()
    else:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"no weights for {name} at {weights}")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        if "_conv_stem.weight" in state:
            state = _from_lukemelas(state, timm.create_model(name, num_classes=1000))
    own = tower.model.state_dict()
    if "pos_embed" in own and "pos_embed" in state:
        state = {**state, "pos_embed": _fit_positions(state["pos_embed"], tower.model)}
    wanted = {key: _find(state, key) for key in own}
    missing = [key for key, value in wanted.items() if value is None and "num_batches_tracked" not in key]
    if missing:
        raise ValueError(f"{weights} lacks {len(missing)} of the {len(own)} tensors of {name}, first {missing[:3]}")
    tower.model.load_state_dict({key: value for key, value in wanted.items() if value is not None}, strict=False)


def _fit_positions(embedding: Tensor, model: nn.Module) -> Tensor:
    """Position embeddings (1, prefix + N, channels) for the model's grid: DINOv2's are for 37x37, we use 27x27."""
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    if embedding.shape[1] == model.pos_embed.shape[1]:
        return embedding
    return resample_abs_pos_embed(embedding, list(model.patch_embed.grid_size), num_prefix_tokens=prefix)


def _find(state: dict[str, Tensor], key: str) -> Tensor | None:
    """timm's feature extractors flatten `blocks.0` to `blocks_0`-like names for some families; accept either."""
    return state.get(key, state.get(key.replace("_", ".", 1)))


def _from_lukemelas(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a lukemelas EfficientNet checkpoint to timm's keys.

    Both list stem, blocks, head and classifier in the order of the computation, so tensors pair up in order; the
    shapes are checked pair by pair.
    """
    source = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    target = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    if len(source) != len(target):
        raise ValueError(f"the checkpoint has {len(source)} tensors, {type(model).__name__} has {len(target)}")
    renamed = {}
    for (old, value), (new, own) in zip(source.items(), target.items(), strict=True):
        if value.shape != own.shape:
            raise ValueError(f"{old} {tuple(value.shape)} does not fit {new} {tuple(own.shape)}")
        renamed[new] = value
    return renamed


def _resize(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Area-average a map down to the grid, or interpolate it up."""
    if x.shape[-1] >= grid[1]:
        return F.adaptive_avg_pool2d(x, grid)
    return F.interpolate(x, size=grid, mode="bilinear", align_corners=False)


def _normalise(x: Tensor) -> Tensor:
    """Layer norm over channels, without parameters. With the factor above every map carries the same energy.

    Else the many channels of a deep map drown the few of a shallow one: on the quickstart the model then learns shapes
    in minutes and colours hardly at all.
    """
    return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],)).permute(0, 3, 1, 2)
