"""Vision encoders from timm, one or several, fused on channels (ML-Mamba equation 5).

Images come as uint8 (n, 3, s, s); every tower normalises them with its own mean and standard deviation, so one batch
serves towers of different families. Prefix tokens (class, registers) are dropped. All towers must give one grid.
At their own size, images come as patches (mlmamba/image_layout.py), and every tower is one of timm's NaFlex encoders or
a plain vision transformer that timm runs as one. Pretrained weights: mlmamba/vision_weights.py.
"""

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import timm
import torch
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn
from torch.nn import functional as F

from mlmamba.configuration import VisionConfig
from mlmamba.connectors.base import Grids

_PADDED = 1.25  # patches of a group with padding, at most, over those without


class VisionTower(nn.Module):
    """One timm model. forward: uint8 (n, 3, s, s) -> (n, N, channels), N = height * width of `grid`.

    Native, forward: uint8 (P, 3 p p), the patches of all images, and their coordinates and numbers -> (P, channels).

    Args:
        spec: an entry of `VisionConfig.towers`. `block` counts as timm does: the blocks of a plain vision transformer,
            the stages of a model that grows coarser as it goes deeper.
        image_size, grid, native: of the VisionConfig.

    Raises:
        ValueError: timm has no such model, block or stage, or `spec` and `grid` do not go together.
    """

    def __init__(self, spec: dict, image_size: int, grid: int | None, native: bool = False):
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
        self.patch: int | None = None
        if native:
            self._build_native()
        elif self.stages is None:
            self._build_tokens(image_size, grid)
        else:
            self._build_maps(image_size, grid)
        data = timm.data.resolve_data_config({}, model=self.model)
        self.mean, self.std = data["mean"], data["std"]

    def _build_tokens(self, image_size: int, grid: int | None) -> None:
        self.model = _create(self.name, image_size, num_classes=0)
        side = image_size // self._find_block()["reduction"]
        if grid not in (None, side):
            raise ValueError(
                f"vision tower {self.name!r} gives {side} x {side} patch tokens at {image_size} pixels, which fixes "
                f"the grid: vision.grid cannot be {grid}, set it to {side} or leave it out"
            )
        self.grid = (side, side)

    def _build_native(self) -> None:
        if self.stages is not None:
            raise ValueError(f"vision tower {self.name!r} gives feature maps; images at their own size need `block`")
        self.model = _create_native(self.name)
        self._find_block()
        (self.patch, _), self.grid = self.model.embeds.patch_size, None

    def _find_block(self) -> dict:
        blocks = self.model.feature_info
        if not -len(blocks) <= self.block < len(blocks):
            raise ValueError(f"vision tower {self.name!r} has {len(blocks)} blocks, there is no {self.block}")
        self.channels = blocks[self.block]["num_chs"]
        return blocks[self.block]

    def _build_maps(self, image_size: int, grid: int | None) -> None:
        if grid is None:
            raise ValueError(f"vision tower {self.name!r} gives feature maps: set vision.grid to the side in cells")
        try:
            self.model = _create(self.name, image_size, features_only=True, out_indices=tuple(self.stages))
        except (AssertionError, IndexError) as error:
            raise ValueError(f"vision tower {self.name!r} has no stages {list(self.stages)}: {error}") from error
        self.channels = sum(self.model.feature_info.channels())
        self.grid = (grid, grid)

    def forward(self, pixels: Tensor, coordinates: Tensor | None = None, lengths: Sequence[int] = ()) -> Tensor:
        weight = next(self.model.parameters())
        mean, std = (torch.tensor(v, device=weight.device).view(3, 1, 1) for v in (self.mean, self.std))
        if self.patch:
            x = ((pixels.float().unflatten(1, (-1, 3)) / 255 - mean.flatten()) / std.flatten()).to(weight.dtype)
            return self._patches(x.flatten(1), coordinates, lengths)
        return self.encode(((pixels.float() / 255 - mean) / std).to(weight.dtype))

    def encode(self, x: Tensor) -> Tensor:
        """Normalised images of one size (n, 3, h, w) -> (n, N, channels)."""
        # Channels last: the convolutions of an encoder that has many take 0.6 of the time, and no encoder takes more.
        x = x.contiguous(memory_format=torch.channels_last)
        return self._tokens(x) if self.stages is None else self._maps(x)

    def _tokens(self, x: Tensor) -> Tensor:
        (block,) = self.model.forward_intermediates(
            x, indices=[self.block], output_fmt="NCHW", intermediates_only=True, stop_early=True
        )
        if self.grid and tuple(block.shape[1:]) != (self.channels, *self.grid):
            raise ValueError(
                f"block {self.block} of vision tower {self.name!r} has {block.shape[1]} channels on a grid of "
                f"{tuple(block.shape[2:])}; timm states {self.channels} on {self.grid}. Choose an image_size that its "
                "strides divide, or `stages` and a grid"
            )
        return block.flatten(2).transpose(1, 2).contiguous()

    def _patches(self, x: Tensor, coordinates: Tensor, lengths: Sequence[int]) -> Tensor:
        """Images of about one length go through together, padded. Where ZeRO-3 shards the weights all go at once, since
        every worker must gather them as often."""
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        out = x.new_empty(len(x), self.channels)
        sharded = hasattr(next(self.model.parameters()), "ds_id")
        for group in [range(len(lengths))] if sharded else _groups(lengths):
            longest = max(lengths[i] for i in group)
            own = torch.tensor([lengths[i] for i in group])[:, None]
            valid = torch.arange(longest) < own
            places = torch.tensor([starts[i] for i in group])[:, None] + torch.arange(longest).minimum(own - 1)
            given = {"patches": x[places.to(x.device)], "patch_coord": coordinates[places].to(x.device)}
            if not bool(valid.all()):
                given["patch_valid"] = valid.to(x.device)
            kept = valid.flatten().nonzero()[:, 0].to(x.device)
            (block,) = self.model.forward_intermediates(
                given, indices=[self.block], output_fmt="NLC", intermediates_only=True, stop_early=True
            )
            block = block.flatten(0, 1).index_select(0, kept).to(out.dtype)
            out = out.index_copy(0, places[valid].to(x.device), block)
        return out

    def _maps(self, x: Tensor) -> Tensor:
        maps = self.model(x)
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        maps = [_normalise(_resize(m, self.grid)) for m in maps]
        even = [m * math.sqrt(self.channels / (len(maps) * m.shape[1])) for m in maps]
        return torch.cat(even, dim=1).flatten(2).transpose(1, 2)


class VisionEncoder(nn.Module):
    """All towers of a VisionConfig. forward: uint8 (n, 3, s, s) -> (n, N, channels). Native: uint8 (P, 3 p p), and the
    images' `spatial_shapes` -> (1, T, channels), the tokens of all images in one row.

    `merge` puts so many tokens by so many together: a quarter of the tokens, four times the channels, for 2.

    Raises:
        ValueError: a tower cannot be built, there is none, they give different grids, or `merge` does not divide it.
    """

    def __init__(self, config):
        super().__init__()
        if not config.towers:
            raise ValueError("vision.towers is empty: name at least one timm model")
        native, self.merge = config.native, config.merge
        self.towers = nn.ModuleList(VisionTower(spec, config.image_size, config.grid, native) for spec in config.towers)
        names = [tower.name for tower in self.towers]
        if len(patches := {tower.patch for tower in self.towers}) > 1:
            raise ValueError(
                f"towers {names} have patches of {sorted(patches)} pixels; fusing on channels needs one size"
            )
        grids = {tower.grid for tower in self.towers}
        if len(grids) > 1:
            raise ValueError(f"towers {names} give different grids {sorted(grids)}; fusing on channels needs one grid")
        (self.patch,), (grid,) = patches, grids
        if grid and any(side % self.merge for side in grid):
            raise ValueError(
                f"vision.merge = {self.merge} does not divide the grid of {grid[0]} x {grid[1]} that {names} give"
            )
        self.grid = grid and (grid[0] // self.merge, grid[1] // self.merge)
        self.channels = sum(tower.channels for tower in self.towers) * self.merge**2
        self.image_size = config.image_size

    def forward(self, pixels: Tensor, spatial_shapes: Tensor | None = None) -> Tensor:
        if self.patch:
            self._check_patches(pixels, spatial_shapes)
            shapes = spatial_shapes.tolist()
            coordinates = torch.cat([torch.cartesian_prod(*map(torch.arange, shape)) for shape in shapes])
            lengths = [height * width for height, width in shapes]
            features = torch.cat([tower(pixels, coordinates, lengths) for tower in self.towers], dim=-1)
            if self.merge > 1:
                features = features[_neighbours(shapes, self.merge).to(pixels.device)]
            return features.view(1, -1, self.channels)
        size = (3, self.image_size, self.image_size)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != size:
            raise ValueError(
                f"images are {pixels.dtype} {tuple(pixels.shape)}; expected uint8 (n, {', '.join(map(str, size))})"
            )
        features = torch.cat([tower(pixels) for tower in self.towers], dim=-1)
        if self.merge == 1:
            return features
        (height, width), m = self.grid, self.merge
        return features.unflatten(1, (height, m, width, m)).transpose(2, 3).reshape(len(pixels), -1, self.channels)

    def grids(self, spatial_shapes: Tensor | None) -> Grids:
        """The grids of the features of images of such shapes."""
        if spatial_shapes is None:
            return self.grid
        return [(height // self.merge, width // self.merge) for height, width in spatial_shapes.tolist()]

    def _check_patches(self, pixels: Tensor, shapes: Tensor | None) -> None:
        width = 3 * self.patch**2
        if pixels.dtype != torch.uint8 or pixels.ndim != 2 or pixels.shape[1] != width:
            raise ValueError(f"images are {pixels.dtype} {tuple(pixels.shape)}; expected patches, uint8 (P, {width})")
        if shapes is None or shapes.ndim != 2 or shapes.shape[1] != 2:
            given = "none" if shapes is None else tuple(shapes.shape)
            raise ValueError(f"images at their own size need spatial_shapes (n, 2) in patches; {given} was given")
        if bool((shapes < 1).any()) or bool((shapes % self.merge).any()) or int(shapes.prod(1).sum()) != len(pixels):
            raise ValueError(
                f"spatial_shapes {shapes.tolist()} are not those of {len(pixels)} patches, {self.merge} x {self.merge} "
                "of which are merged; give what MLMambaProcessor made"
            )


def measure(config) -> tuple[int, tuple[int, int]]:
    """Channels and grid (height, width) of a VisionConfig, found by running it without weights. Native: channels and,
    in place of the grid, the size of a patch in pixels; nothing is run.

    Raises:
        ValueError: the encoders cannot be built, do not fit together, or cannot read images of that size.
    """
    most = config.max_tokens if config.native else None
    return _measure(json.dumps(config.towers), config.image_size, config.grid, config.merge, most)


@lru_cache
def _measure(towers: str, image_size: int, grid: int | None, merge: int, most: int | None) -> tuple:
    with torch.device("meta"):
        towers = json.loads(towers)
        config = VisionConfig(towers=towers, image_size=image_size, grid=grid, merge=merge, max_tokens=most)
        encoder = VisionEncoder(config).eval()
        if encoder.patch:
            return encoder.channels, (encoder.patch, encoder.patch)
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


def _create_native(name: str) -> NaFlexVit:
    """A NaFlex encoder, or a plain vision transformer as one, without pretrained weights. Raises ValueError."""
    if ":" not in name:
        _check_name(name)
    options = {} if name.startswith("naflex") else {"use_naflex": True}
    try:
        model = timm.create_model(name, num_classes=0, **options)
    except (TypeError, RuntimeError, AssertionError):  # no such option: it is no vision transformer
        model = None
    if not isinstance(model, NaFlexVit) or len(set(model.embeds.patch_size)) > 1:
        raise ValueError(
            f"vision tower {name!r} cannot read images at their own size: choose a NaFlex encoder such as "
            "naflexvit_so400m_patch16_siglip, a plain vision transformer, or vision.tiles"
        )
    return model


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Images by length, those together that padding does not make much larger."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = (len(group) + 1) * lengths[i]
        if group and padded > _PADDED * (sum(lengths[k] for k in group) + lengths[i]):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _neighbours(shapes: Sequence[tuple[int, int]], merge: int) -> Tensor:
    """The patches of images in the order in which so many by so many of them, which become one, stand together."""
    found, start = [], 0
    for height, width in shapes:
        own = torch.arange(start, start := start + height * width).view(height // merge, merge, width // merge, merge)
        found.append(own.transpose(1, 2).flatten())
    return torch.cat(found)


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
