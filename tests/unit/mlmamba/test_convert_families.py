"""Hybrids in transformers' layouts: every tensor is used, and what cannot be followed is refused by its field.

What is computed with the results is in tests/parity/test_transformers_hybrids.py.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mlmamba.convert import convert, load_language_model, read_language_model
from tests.helpers.tiny import tiny_model
from tests.parity.test_transformers_hybrids import COMMON, FAMILIES

QUERIES, KEYS, VALUES = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Granite and a Nemotron-H."""
    found = {}
    for kind in ("granitemoehybrid", "nemotron_h"):
        torch.manual_seed(0)
        found[kind] = tmp_path_factory.mktemp(kind)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**COMMON | FAMILIES[kind]))
        model.bfloat16().save_pretrained(found[kind])
    return found


def changed(source, folder, fields: dict | None = None, tensors: dict | None = None):
    """A copy with other fields of its config, and other tensors; None takes a tensor away."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | (fields or {})))
    if tensors:
        found = load_file(folder / "model.safetensors") | tensors
        found = {name: value for name, value in found.items() if value is not None}
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_bit_is_kept(saved):
    theirs = load_file(saved["granitemoehybrid"] / "model.safetensors")
    model = read_language_model(saved["granitemoehybrid"])
    assert model.layout == "granitemoehybrid"
    assert model.config.layers == ["mamba2", "mlp", "attention", "mlp"] * 2
    assert {value.dtype for value in model.tensors.values()} == {torch.bfloat16}
    assert model.parameters == sum(value.numel() for value in theirs.values())
    joined = torch.cat([theirs[name] for name in (QUERIES, KEYS, VALUES)])
    assert torch.equal(model.tensors["backbone.layers.2.mixer.in_proj.weight"], joined)


def test_names_of_layers_as_older_files_have_them(saved, tmp_path):
    folder = changed(saved["granitemoehybrid"], tmp_path, {"layer_types": ["mamba", "attention"] * 2})
    assert read_language_model(folder).config.layers == ["mamba2", "mlp", "attention", "mlp"] * 2


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("granitemoehybrid", {"num_local_experts": 8}, "num_local_experts is 8: mixtures of experts are not supported"),
        ("granitemoehybrid", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; this library's Mamba-2 has 'silu' only"),
        (
            "granitemoehybrid",
            {"layer_types": ["conv"] * 4},
            "a layer is of type 'conv'; known are linear_attention, fu",
        ),
        ("granitemoehybrid", {"layer_types": ["mamba"]}, "must be equal to the number of `layer_types`"),
        ("granitemoehybrid", {"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ("granitemoehybrid", {"num_key_value_heads": 3}, "with 4 heads in 3 groups of 8 channels"),
        (
            "granitemoehybrid",
            {
                "position_embedding_type": "rope",
                "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
            },
            "rope_type is 'yarn'; rotary positions are 'default' here",
        ),
        ("nemotron_h", {"layers_block_type": ["moe"] * 5}, "layers_block_type has moe layers: mixtures of experts are"),
        ("nemotron_h", {"mlp_hidden_act": "relu"}, "mlp_hidden_act is 'relu'; this library's ungated MLP has 'relu2'"),
        ("nemotron_h", {"sliding_window": 8}, "sliding_window is 8; attention here sees the whole sequence"),
        ("nemotron_h", {"model_type": "zamba2"}, "model_type is 'zamba2'. Known are transformers' .mamba2, granitemoe"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(saved, tmp_path, kind, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_language_model(changed(saved[kind], tmp_path, fields))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {KEYS: None},
            r"1 of 38 tensors are missing, first \['backbone\.layers\.2\.mixer\.in_proj\.weight'\]; 2 are unexp",
        ),
        ({"model.layers.9.gate": torch.ones(2)}, r"1 are unexpected, first \['model\.layers\.9\.gate'\]"),
        ({KEYS: torch.ones(2, 32)}, r"in_proj\.weight is \(50, 32\), not \(64, 32\)"),
        ({"model.norm.weight": None}, r"1 of 38 tensors are missing, first \['backbone\.norm_f\.weight'\]"),
    ],
)
def test_tensors_are_exactly_those_of_the_config(saved, tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        read_language_model(changed(saved["granitemoehybrid"], tmp_path, None, tensors))


def test_a_hybrid_goes_into_a_model_of_its_sizes_only(saved, tmp_path):
    source = read_language_model(saved["granitemoehybrid"])
    model = tiny_model(source.config.to_dict() | {"vocab_size": 300})
    load_language_model(model.language_model, source)
    joined = model.language_model.state_dict()["backbone.layers.2.mixer.in_proj.weight"]
    assert torch.equal(joined, source.tensors["backbone.layers.2.mixer.in_proj.weight"].float())
    with pytest.raises(ValueError, match="does not fit"):
        load_language_model(tiny_model().language_model, source)
    with pytest.raises(
        ValueError, match="is a hybrid, of attention, mamba2, mlp blocks; only a pure Mamba-2 is written"
    ):
        convert(saved["granitemoehybrid"], tmp_path / "out", "state-spaces")
    assert not (tmp_path / "out").exists()
