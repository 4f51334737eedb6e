"""Vision encoders from timm, one or several, fused on channels (ML-Mamba equation 5).

Images come as uint8 (n, 3, s, s); every tower normalises them with its own mean and standard deviation, so one batch
serves towers of different families. Prefix tokens (class, registers) are dropped. All towers must give one grid.
Pretrained weights: mlmamba/vision_weights.py.
"""

import difflib
import json
import math
from functools import lru_cache

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlmamba.configuration import VisionConfig


class VisionTower(nn.Module):
    """One timm model. forward: uint8 (n, 3, s, s) -> (n, N, channels), N = height * width of `grid`.

    Args:
        spec: an entry of `VisionConfig.towers`. `block` counts as timm does: the blocks of a plain vision transformer,
            the stages of a model that grows coarser as it goes deeper.
        image_size, grid: of the VisionConfig.

    Raises:
        ValueError: timm has no such model, block or stage, or `spec` and `grid` do not go together.
    """

    def __init__(self, spec: dict, image_size: int, grid: int | None):
        super().__init__()
        spec = dict(spec)
        self.name = spec.pop("model")
        self.stages, self.block = spec.pop("stages", None), spec.pop("block", None)
        if spec:
            raise ValueError(f"vision tower {self.name!r} has unknown keys {sorted(spec)}; known: model, stages, block")
        if (self.stages is None) == (self.block is None):
            raise ValueError(
                f"vision tower {self.name!r} needs either `block` (patch tokens) or `stages` (feature maps)"
            )
        if self.stages is None:
            self._build_tokens(image_size, grid)
        else:
            self._build_maps(image_size, grid)
        data = timm.data.resolve_data_config({}, model=self.model)
        self.mean, self.std = data["mean"], data["std"]

    def _build_tokens(self, image_size: int, grid: int | None) -> None:
        self.model = _create(self.name, image_size, num_classes=0)
        blocks = self.model.feature_info
        if not -len(blocks) <= self.block < len(blocks):
            raise ValueError(f"vision tower {self.name!r} has {len(blocks)} blocks, there is no {self.block}")
        self.channels = blocks[self.block]["num_chs"]
        side = image_size // blocks[self.block]["reduction"]
        if grid not in (None, side):
            raise ValueError(
                f"vision tower {self.name!r} gives {side} x {side} patch tokens at {image_size} pixels, which fixes "
                f"the grid: vision.grid cannot be {grid}, set it to {side} or leave it out"
            )
        self.grid = (side, side)

    def _build_maps(self, image_size: int, grid: int | None) -> None:
        if grid is None:
            raise ValueError(f"vision tower {self.name!r} gives feature maps: set vision.grid to the side in cells")
        try:
            self.model = _create(self.name, image_size, features_only=True, out_indices=tuple(self.stages))
        except (AssertionError, IndexError) as error:
            raise ValueError(f"vision tower {self.name!r} has no stages {list(self.stages)}: {error}") from error
        self.channels = sum(self.model.feature_info.channels())
        self.grid = (grid, grid)

    def forward(self, pixels: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        mean, std = (torch.tensor(v, device=weight.device).view(3, 1, 1) for v in (self.mean, self.std))
        x = ((pixels.float() / 255 - mean) / std).to(weight.dtype)
        # Channels last: the convolutions of an encoder that has many take 0.6 of the time, and no encoder takes more.
        x = x.contiguous(memory_format=torch.channels_last)
        return self._tokens(x) if self.stages is None else self._maps(x)

    def _tokens(self, x: Tensor) -> Tensor:
        (block,) = self.model.forward_intermediates(
            x, indices=[self.block], output_fmt="NCHW", intermediates_only=True, stop_early=True
        )
        if tuple(block.shape[1:]) != (self.channels, *self.grid):
            raise ValueError(
                f"block {self.block} of vision tower {self.name!r} has {block.shape[1]} channels on a grid of "
                f"{tuple(block.shape[2:])}; timm states {self.channels} on {self.grid}. Choose an image_size that its "
                "strides divide, or `stages` and a grid"
            )
        return block.flatten(2).transpose(1, 2).contiguous()

    def _maps(self, x: Tensor) -> Tensor:
        maps = self.model(x)
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        maps = [_normalise(_resize(m, self.grid)) for m in maps]
        even = [m * math.sqrt(self.channels / (len(maps) * m.shape[1])) for m in maps]
        return torch.cat(even, dim=1).flatten(2).transpose(1, 2)


class VisionEncoder(nn.Module):
    """All towers of a VisionConfig. forward: uint8 (n, 3, s, s) -> (n, N, sum of channels).

    Raises:
        ValueError: a tower cannot be built, there is none, or they give different grids.
    """

    def __init__(self, config):
        super().__init__()
        if not config.towers:
            raise ValueError("vision.towers is empty: name at least one timm model")
        self.towers = nn.ModuleList(VisionTower(spec, config.image_size, config.grid) for spec in config.towers)
        grids = {tower.grid for tower in self.towers}
        if len(grids) > 1:
            names = [tower.name for tower in self.towers]
            raise ValueError(f"towers {names} give different grids {sorted(grids)}; fusing on channels needs one grid")
        self.grid = self.towers[0].grid
        self.channels = sum(tower.channels for tower in self.towers)
        self.image_size = config.image_size

    def forward(self, pixels: Tensor) -> Tensor:
        size = (3, self.image_size, self.image_size)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != size:
            raise ValueError(
                f"images are {pixels.dtype} {tuple(pixels.shape)}; expected uint8 (n, {', '.join(map(str, size))})"
            )
        return torch.cat([tower(pixels) for tower in self.towers], dim=-1)


def measure(config) -> tuple[int, tuple[int, int]]:
    """Channels and grid (height, width) of a VisionConfig, found by running it without weights.

    Raises:
        ValueError: the encoders cannot be built, do not fit together, or cannot read images of that size.
    """
    return _measure(json.dumps(config.towers), config.image_size, config.grid)


@lru_cache
def _measure(towers: str, image_size: int, grid: int | None) -> tuple[int, tuple[int, int]]:
    with torch.device("meta"):
        encoder = VisionEncoder(VisionConfig(towers=json.loads(towers), image_size=image_size, grid=grid)).eval()
        image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
        for tower in encoder.towers:
            try:
                tower(image)
            except (AssertionError, RuntimeError) as error:  # timm's own ways of refusing a size
                message = f"vision tower {tower.name!r} cannot read images of {image_size} pixels: {error}"
                raise ValueError(message) from error
    return encoder.channels, encoder.grid


def _create(name: str, image_size: int, **options) -> nn.Module:
    """A timm model without pretrained weights, told the image's size if it is built for one size only."""
    if ":" in name:  # a hub repository or a folder, which timm reads itself: taken for a vision transformer
        fixed = "features_only" not in options
    else:
        _check_name(name)
        fixed = timm.get_pretrained_cfg(name).fixed_input_size
    return timm.create_model(name, **options, **({"img_size": image_size} if fixed else {}))


def _check_name(name: str) -> None:
    """Raises ValueError with the nearest known names unless timm knows this architecture and its tag."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"timm {timm.__version__} has no model {name!r}" + _did_you_mean(known))
    tags = [full.partition(".")[2] for full in timm.list_pretrained(architecture)]
    if tag and tag not in tags:
        known = [f"{architecture}.{t}" for t in difflib.get_close_matches(tag, tags, n=3, cutoff=0.0)]
        raise ValueError(f"timm {timm.__version__} has no weights {name!r}" + _did_you_mean(known))


def _did_you_mean(names: list[str]) -> str:
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


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
