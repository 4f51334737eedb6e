"""Vision encoders: the papers' pair by its numbers, tiny encoders by what they compute and refuse.

The full-size encoders exist on the meta device only, without weights. Loading weights is in test_vision_weights.py.
"""

import pytest
import timm
import torch
from closeness import assert_close

from mlmamba.configuration import VisionConfig
from mlmamba.vision import VisionEncoder, measure, tokens_per_image

DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384.webli"
VIT, MAPS = "test_vit.r160_in1k", "test_efficientnet.r160_in1k"
PAIR = VisionConfig(towers=[{"model": name, "block": -2} for name in (DINO, SIGLIP)], image_size=384)


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
    assert tokens_per_image(PAIR) == 729


def test_the_papers_pair_has_the_known_sizes():
    """DINOv2 is 304.4M at its own 518 pixels; at 384 it has 640 position embeddings fewer."""
    with torch.device("meta"):
        dino, siglip = VisionEncoder(PAIR).towers
    sizes = [sum(p.numel() for p in tower.parameters()) for tower in (dino, siglip)]
    assert sizes == [304_370_688 - (37 * 37 - 27 * 27) * 1024, 428_225_600]


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
    """The same weights under the statistics of another family see another picture."""
    tower, x = build(patches()).towers[0], pixels(32)
    assert (tower.mean, tower.std) == ((0.5,) * 3, (0.5,) * 3)
    own = tower(x)
    direct = tower.model.get_intermediate_layers(x.float() / 127.5 - 1, n=[len(tower.model.blocks) - 2])[0]
    assert_close(own, direct, 1e-5)
    imagenet = build(maps(0)).towers[0]
    assert (imagenet.mean, imagenet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    tower.mean, tower.std = imagenet.mean, imagenet.std
    assert (tower(x) - own).abs().max() > 1e-2


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
        (VisionConfig(towers=[{"model": VIT, "block": -2}], image_size=32, grid=2), "set grid: null"),
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
def test_pictures_of_another_form_are_refused(x):
    with pytest.raises(ValueError, match=r"expected uint8 \(n, 3, 32, 32\)"):
        build(patches())(x)


def test_models_without_the_old_layer_interface_work_too():
    """timm's DINOv3 and EVA have `forward_intermediates` only."""
    config = patches(model="vit_small_patch16_dinov3")
    encoder = build(config)
    assert timm.create_model("vit_small_patch16_dinov3").num_prefix_tokens == 5
    assert encoder(pixels(32)).shape == (2, 4, 384)
