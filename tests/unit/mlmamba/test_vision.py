"""Vision encoders: the papers' pair by its numbers, tiny encoders by what they compute and refuse.

The full-size encoders exist on the meta device only, without weights. Loading weights is in test_vision_weights.py.
"""

import json

import pytest
import timm
import torch

from mlmamba.configuration import VisionConfig
from mlmamba.image_layout import ImageLayout
from mlmamba.images import to_pixels
from mlmamba.presets import preset
from mlmamba.vision import VisionEncoder, measure
from mlmamba.vision_weights import put_weights
from tests.helpers.closeness import assert_close
from tests.helpers.images import image

VIT, MAPS = "test_vit.r160_in1k", "test_efficientnet.r160_in1k"
PAIR = preset("2.7b").vision_config


def patches(size: int = 32, block: int = -2, model: str = VIT) -> VisionConfig:
    return VisionConfig(towers=[{"model": model, "block": block}], image_size=size)


def maps(*stages: int, grid: int | None = 4, model: str = MAPS) -> VisionConfig:
    return VisionConfig(towers=[{"model": model, "stages": list(stages)}], image_size=64, grid=grid)


def build(config: VisionConfig) -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(config).eval()


def pixels(size: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_papers_pair_gives_729_tokens_of_2176_channels():
    assert measure(PAIR) == (2176, (27, 27))
    with torch.device("meta"):
        features = VisionEncoder(PAIR)(torch.zeros(2, 3, 384, 384, dtype=torch.uint8))
    assert features.shape == (2, 729, 2176)


def test_the_papers_pair_has_the_known_sizes_and_blocks():
    """DINOv2 is 304.4M at its own 518 pixels; at 384 it has 640 position embeddings fewer. Second-to-last blocks."""
    with torch.device("meta"):
        dino, siglip = VisionEncoder(PAIR).towers
    sizes = [sum(p.numel() for p in tower.parameters()) for tower in (dino, siglip)]
    assert sizes == [304_370_688 - (37 * 37 - 27 * 27) * 1024, 428_225_600]
    assert [(len(t.model.blocks), t.block, t.channels) for t in (dino, siglip)] == [(24, -2, 1024), (27, -2, 1152)]
    assert [t.model.num_prefix_tokens for t in (dino, siglip)] == [5, 0]
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert [(t.mean, t.std) for t in (dino, siglip)] == [imagenet, ((0.5,) * 3, (0.5,) * 3)]


def test_patch_tokens_are_the_chosen_block_without_class_token():
    encoder, x = build(patches()), pixels(32)
    vit = encoder.towers[0].model
    assert vit.num_prefix_tokens == 1
    read = []
    handle = vit.blocks[-2].register_forward_hook(lambda module, args, out: read.append(out))
    features = encoder(x)
    handle.remove()
    assert features.shape == (2, 4, 64)
    assert torch.equal(features, read[0][:, 1:])


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "prefix", "size"),
    [("test_vit", 1, 64), ("test_vit2", 1, 64), ("vit_small_patch14_reg4_dinov2.lvd142m", 5, 56)],
    ids=["class token", "register", "class token and 4 registers"],
)
def test_a_block_is_what_timm_gives_for_it_without_prefix(model, prefix, size):
    """By timm's older interface, the one that the released code calls. Any block, counted from either end."""
    encoder, x = build(patches(size=size, model=model)), pixels(size)
    tower = encoder.towers[0]
    assert tower.model.num_prefix_tokens == prefix
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tower.mean, tower.std))
    for tower.block in (0, 3, -2, -1):
        index = tower.block % len(tower.model.blocks)
        (expected,) = tower.model.get_intermediate_layers((x / 255 - mean) / std, n=[index])
        assert expected.shape == (2, 16, tower.channels)
        assert torch.equal(encoder(x), expected)


def test_blocks_after_the_chosen_one_do_not_run():
    encoder, ran = build(patches()), []
    encoder.towers[0].model.blocks[-1].register_forward_hook(lambda *args: ran.append(args))
    encoder(pixels(32))
    assert not ran


def test_feature_maps_are_brought_to_one_grid_and_weigh_the_same():
    encoder = build(maps(0, 2))
    features = encoder(pixels(64))
    widths = encoder.towers[0].model.feature_info.channels()
    assert features.shape == (2, 16, sum(widths))
    for part in features.split(widths, dim=-1):
        assert_close(part.mean(-1), torch.zeros(2, 16), 1e-4, floor=1.0)
        assert_close(part.square().sum(-1), torch.full((2, 16), sum(widths) / 2), 0.05)


def test_maps_smaller_than_the_grid_are_interpolated():
    assert build(maps(4, grid=8))(pixels(64)).shape == (2, 64, measure(maps(4, grid=8))[0])


def test_towers_are_fused_on_channels():
    both = VisionConfig(
        towers=[{"model": VIT, "block": -2}, {"model": "test_vit2.r160_in1k", "block": -1}], image_size=32
    )
    encoder = build(both)
    features = encoder(pixels(32))
    assert features.shape == (2, 4, 128)
    assert measure(both) == (128, (2, 2)) == (encoder.channels, encoder.grid)
    assert torch.equal(features[..., 64:], encoder.towers[1](pixels(32)))


def test_every_tower_normalises_with_its_own_mean_and_deviation():
    """The same weights under the statistics of another family see another image."""
    tower, x = build(patches()).towers[0], pixels(32)
    assert (tower.mean, tower.std) == ((0.5,) * 3, (0.5,) * 3)
    own = tower(x)
    direct = tower.model.get_intermediate_layers(x.float() / 127.5 - 1, n=[len(tower.model.blocks) - 2])[0]
    assert_close(own, direct, 1e-5)
    imagenet = build(maps(0)).towers[0]
    assert (imagenet.mean, imagenet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    tower.mean, tower.std = imagenet.mean, imagenet.std
    assert (tower(x) - own).abs().max() > 1e-2


@torch.no_grad()
def test_fused_towers_of_different_families_see_the_image_in_their_own_range():
    """A tower of patches beside a tower of maps; each as timm gives it for an image normalised by its own data."""
    towers = [{"model": VIT, "block": -2}, {"model": MAPS, "stages": [2]}]
    encoder, x = build(VisionConfig(towers=towers, image_size=64, grid=4)), pixels(64)
    vit, cnn = encoder.towers
    assert vit.mean != cnn.mean
    seen = []
    for tower in (vit, cnn):
        normalise = timm.data.create_transform(**timm.data.resolve_data_config({}, model=tower.model)).transforms[-1]
        seen.append(normalise(x / 255))
    (tokens,) = vit.model.get_intermediate_layers(seen[0], n=[len(vit.model.blocks) - 2])
    (deep,) = cnn.model(seen[1])
    features = encoder(x)
    assert_close(features[..., : vit.channels], tokens, 1e-5)
    averaged = torch.nn.functional.adaptive_avg_pool2d(deep, (4, 4)).flatten(2).transpose(1, 2)
    assert_close(features[..., vit.channels :], torch.nn.functional.layer_norm(averaged, averaged.shape[2:]), 1e-4)


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext", "test_vit", "test_nfnet", "test_maxvit"])
def test_feature_maps_of_any_family(model):
    """timm extracts features in several ways; the last two are built for one image size."""
    config = VisionConfig(towers=[{"model": model, "stages": [1, 2]}], image_size=128, grid=5)
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    assert measure(config) == (sum(encoder.towers[0].model.feature_info.channels()), (5, 5))


@torch.no_grad()
def test_channels_last_maps_are_turned_round():
    """timm's MambaOut, like its Swin, gives (n, h, w, c)."""
    tower = build(maps(1, model="test_mambaout", grid=8)).towers[0]
    (last,) = tower.model(torch.rand(1, 3, 64, 64))
    assert last.shape == (1, 8, 8, tower.channels)
    x = pixels(64, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tower.mean, tower.std))
    (expected,) = tower.model((x / 255 - mean) / std)
    assert_close(tower(x), torch.nn.functional.layer_norm(expected, expected.shape[3:]).flatten(1, 2), 1e-5)


@pytest.mark.parametrize("model", ["test_convnext", "xcit_nano_12_p8_224", "mixer_s32_224"])
def test_a_block_of_any_family(model):
    """Not only of plain vision transformers: `block` counts what timm calls intermediate features."""
    with torch.device("meta"):
        info = timm.create_model(model).feature_info[-2]
    side = 64 // info["reduction"]
    assert measure(patches(size=64, model=model)) == (info["num_chs"], (side, side))


def test_a_model_that_timm_reads_from_a_folder(tmp_path):
    """The form that its weights have on the hub: a config.json that names the architecture."""
    config = {"architecture": "test_vit", "num_classes": 0, "num_features": 64}
    config["pretrained_cfg"] = {
        "input_size": [3, 160, 160],
        "fixed_input_size": True,
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = build(patches(model=f"local-dir:{tmp_path}"))
    assert encoder(pixels(32)).shape == (2, 4, 64)
    assert (encoder.towers[0].mean, encoder.towers[0].std) == ([0.1] * 3, [0.2] * 3)


def test_a_grid_may_be_given_to_patches_if_it_is_theirs():
    config = patches()
    config.grid = 2
    assert measure(config) == (64, (2, 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("test_vitt", r"has no model 'test_vitt'; did you mean 'test_vit\d?' or 'test_vit\d?'"),
        ("dinov2_large", "has no model 'dinov2_large'"),
        ("zzz", "has no model 'zzz'$"),
        (
            "vit_large_patch14_reg4_dinov2.lvd142",
            r"has no weights 'vit_large_patch14_reg4_dinov2\.lvd142'; did you mean '.*\.lvd142m'\?",
        ),
    ],
)
def test_wrong_names_are_refused_with_the_nearest_known_ones(model, message):
    with pytest.raises(ValueError, match=message):
        measure(patches(model=model))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (patches(size=40), r"'test_vit.r160_in1k' cannot read images of 40 pixels: Input height \(40\)"),
        (patches(size=250, block=1, model="test_resnet"), r"has 32 channels on a grid of \(63, 63\); timm states 32"),
    ],
)
def test_sizes_that_an_encoder_cannot_take_are_refused_before_there_are_weights(config, message):
    with pytest.raises(ValueError, match=message):
        measure(config)


def test_towers_of_different_grids_are_refused():
    config = VisionConfig(
        towers=[{"model": VIT, "block": -2}, {"model": "vit_tiny_patch16_224", "block": -2}], image_size=64
    )
    assert measure(config)[1] == (4, 4)
    config.towers[1]["model"] = "vit_small_patch8_224"
    with pytest.raises(ValueError, match=r"different grids \[\(4, 4\), \(8, 8\)\]; fusing on channels needs one grid"):
        VisionEncoder(config)
    with pytest.raises(ValueError, match="different grids"):
        measure(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VisionConfig(), "vision.towers is empty"),
        (VisionConfig(towers=[{"model": VIT}]), "needs either `block`"),
        (VisionConfig(towers=[{"model": VIT, "block": -2, "stages": [0]}]), "needs either `block`"),
        (VisionConfig(towers=[{"model": VIT, "block": -2, "layer": 3}]), r"unknown keys \['layer'\]"),
        (
            VisionConfig(towers=[{"model": VIT, "block": -2}], image_size=32, grid=3),
            r"gives 2 x 2 patch tokens at 32 pixels.* vision.grid cannot be 3, set it to 2 or leave it out",
        ),
        (maps(0, 9), r"has no stages \[0, 9\]"),
        (maps(0, grid=None), "set vision.grid"),
        (patches(block=-7), "has 6 blocks, there is no -7"),
        (patches(block=6), "has 6 blocks, there is no 6"),
    ],
)
def test_configs_that_make_no_sense_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        VisionEncoder(config)
    with pytest.raises(ValueError, match=message):
        measure(config)


@pytest.mark.parametrize(
    "x",
    [pixels(48), pixels(32).float(), pixels(32)[:, :1], pixels(32)[0]],
    ids=["another size", "float", "grey", "no batch"],
)
def test_images_of_another_form_are_refused(x):
    with pytest.raises(ValueError, match=r"expected uint8 \(n, 3, 32, 32\)"):
        build(patches())(x)


def test_models_without_the_old_layer_interface_work_too():
    """timm's DINOv3 and EVA have `forward_intermediates` only."""
    config = patches(model="vit_small_patch16_dinov3")
    encoder = build(config)
    assert timm.create_model("vit_small_patch16_dinov3").num_prefix_tokens == 5
    assert encoder(pixels(32)).shape == (2, 4, 384)


@pytest.mark.parametrize("config", [maps(0, 3), patches()], ids=["maps", "patches"])
def test_convolutions_read_channels_last_and_compute_the_same(config):
    encoder, images, read = build(config), pixels(config.image_size, count=9), []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        fast = encoder(images)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in read)
        for module in encoder.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
        assert_close(encoder(images), fast, 1e-5)


NATIVE = VisionConfig(towers=[{"model": VIT, "block": -2}], min_tokens=1, max_tokens=64)


def at_own_size(config: VisionConfig, *sizes: tuple[int, int]) -> tuple[VisionEncoder, list[dict]]:
    layout = ImageLayout(patch=16, merge=config.merge, min_tokens=config.min_tokens, max_tokens=config.max_tokens)
    return build(config), [layout.batch([layout.cut(image(i, size, (3, 3)))]) for i, size in enumerate(sizes)]


def together(batches: list[dict]) -> dict:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_a_plain_transformer_reads_a_square_at_its_own_size_as_it_reads_squares():
    native, (batch,) = at_own_size(VisionConfig(**{**NATIVE.to_dict(), "max_tokens": 100}), (160, 160))
    square, shown = build(patches(160)), torch.from_numpy(to_pixels(image(0, (160, 160), (3, 3)), 160))[None]
    put_weights(native.towers[0], VIT, square.towers[0].model.state_dict(), "the square's")
    assert_close(native(*batch.values()), square(shown), 1e-5)


@pytest.mark.parametrize("merge", [1, 2])
def test_neighbours_and_their_padding_change_nothing(merge):
    config = VisionConfig(**{**NATIVE.to_dict(), "merge": merge})
    native, batches = at_own_size(config, (96, 32), (160, 128), (64, 64), (170, 120), (32, 32))
    whole = native(*together(batches).values())
    assert whole.shape == (1, sum(b["spatial_shapes"].prod() // merge**2 for b in batches), 64 * merge**2)
    assert_close(whole, torch.cat([native(*batch.values()) for batch in batches], 1), 1e-5)


def test_what_is_merged_are_neighbours():
    one, batches = at_own_size(NATIVE, (96, 64))
    config = VisionConfig(**{**NATIVE.to_dict(), "merge": 2})
    two, merged = at_own_size(config, (96, 64))
    two.load_state_dict(one.state_dict())
    plain = one(*batches[0].values()).view(2, 2, 3, 2, 64).transpose(1, 2).reshape(1, 6, 256)
    assert_close(two(*merged[0].values()), plain, 1e-5)
    square = build(VisionConfig(towers=NATIVE.towers, image_size=64, merge=2))
    alone = build(patches(64))
    x = pixels(64)
    assert_close(square(x), alone(x).view(2, 2, 2, 2, 2, 64).transpose(2, 3).reshape(2, 4, 256), 1e-6)
    assert measure(square_config := VisionConfig(towers=NATIVE.towers, image_size=64, merge=2)) == (256, (2, 2))
    assert measure(VisionConfig(**{**square_config.to_dict(), "max_tokens": 9})) == (256, (16, 16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"towers": [{"model": MAPS, "block": -2}]}, "cannot read images at their own size: choose a NaFlex encoder"),
        ({"towers": [{"model": MAPS, "stages": [0]}]}, "gives feature maps; images at their own size need `block`"),
        ({"towers": [{"model": VIT, "block": 9}]}, "has 6 blocks, there is no 9"),
        ({"max_tokens": None, "merge": 3}, "vision.merge = 3 does not divide the grid of 24 x 24"),
    ],
)
def test_what_cannot_be_native_or_merged_is_refused(fields, message):
    config = VisionConfig(**{"towers": NATIVE.towers, "max_tokens": 64, **fields})
    if config.merge == 3:
        config.image_size = 352
        message = message.replace("24 x 24", "22 x 22")
    with pytest.raises(ValueError, match=message):
        measure(config)


def test_patches_that_do_not_fit_their_shapes_are_refused():
    native, (batch,) = at_own_size(NATIVE, (96, 32))
    with pytest.raises(ValueError, match=r"need spatial_shapes \(n, 2\) in patches; none was given"):
        native(batch["pixel_values"])
    with pytest.raises(ValueError, match="are not those of 12 patches"):
        native(batch["pixel_values"], batch["spatial_shapes"] + 1)
    with pytest.raises(ValueError, match=r"expected patches, uint8 \(P, 768\)"):
        native(pixels(32), batch["spatial_shapes"])


def test_siglip_2_at_its_own_size_has_the_published_parameters():
    config = VisionConfig(towers=[{"model": "naflexvit_so400m_patch16_siglip.v2_webli", "block": -2}], max_tokens=256)
    assert measure(config) == (1152, (16, 16))
