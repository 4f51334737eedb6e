"""What a recipe says about a hybrid's blocks: checked before any work, and part of what names run and stage."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.tiny import tiny_tokenizer
from tests.parity.test_transformers_hybrids import COMMON, GRANITE
from workflows.errors import UsageError
from workflows.preflight import check_weights
from workflows.recipe.load import load_recipe
from workflows.storage.folder import Folder
from workflows.storage.layout import layout_of
from workflows.train.initial import build_initial, model_config

TEXT = "model.text"


def folders(tmp_path, overrides=()):
    layout = layout_of(load_recipe("hybrid-quickstart", list(overrides)), Folder(tmp_path), 16)
    return layout.data["full"], layout.initial


def test_the_shipped_hybrid_trains_on_the_quickstarts_data_set(tmp_path):
    plain = layout_of(load_recipe("quickstart"), Folder(tmp_path), 16)
    assert folders(tmp_path)[0] == plain.data["full"]
    assert folders(tmp_path)[1] != plain.initial


@pytest.mark.parametrize(
    "override",
    [
        "layers=[mamba2, mlp, attention, mamba2, mamba2]",
        "num_key_value_heads=4",
        "attention_head_dim=16",
        "rope_theta=10000",
        "mlp_size=128",
        "max_position_embeddings=4096",
        "num_heads=8",
    ],
)
def test_every_field_of_the_blocks_decides_the_run_and_not_the_data(tmp_path, override):
    data, initial = folders(tmp_path)
    other_data, other = folders(tmp_path, [f"{TEXT}.{override}"])
    assert other_data == data
    assert other != initial


def test_a_pure_models_run_keeps_its_name(tmp_path):
    """As it was named before recipes knew hybrids."""
    assert "quickstart-8c648b8c2d" in str(layout_of(load_recipe("quickstart"), Folder(tmp_path), 16).initial)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layers=[mamba2, lstm]", "'mamba2', 'attention', 'mlp' or 'both'"),
        ("layers=[]", "num_hidden_layers: Input should be greater than 0"),
        ("num_key_value_heads=3", "with 4 heads in 3 groups of 32 channels"),
        ("num_attention_heads=0", "with 0 heads in 2 groups of 32 channels"),
        ("mlp_size=0", "layers has mlp blocks, and mlp_size is 0; give their inner width"),
        ("num_hidden_layers=3", "layers lists 5 blocks, num_hidden_layers is 3"),
        ("partial_rotary_factor=2", "less than or equal to 1"),
        ("max_position_embeddings=0", "greater than 0"),
    ],
)
def test_blocks_that_are_no_model_are_refused_when_the_recipe_is_read(override, message):
    with pytest.raises(UsageError, match=message):
        load_recipe("hybrid-quickstart", [f"{TEXT}.{override}"])


def test_layers_given_to_a_preset_say_how_many_blocks_there_are():
    text = {"layers": ["mamba2", "attention", "mamba2"], "num_attention_heads": 2, "num_key_value_heads": 1}
    changes = json.dumps(text | {"attention_head_dim": 8})
    recipe = load_recipe("quickstart", [f"model={{preset: tiny, text: {changes}}}"])
    assert recipe.model.text.num_hidden_layers == 3
    granite = load_recipe("paper", ["model.preset=granite-4.0-h-350m", "model.text={}"]).model.text
    assert (granite.num_hidden_layers, granite.heads, granite.layers.count("attention")) == (64, 48, 4)


def test_rows_longer_than_attention_has_room_for_are_refused():
    recipe = load_recipe("hybrid-quickstart", [f"{TEXT}.max_position_embeddings=700"])
    with pytest.raises(UsageError, match=r"data\.max_tokens is 768, attention has room for 700 .*of model\.text"):
        model_config(recipe, tiny_tokenizer())


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("granite")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**COMMON | GRANITE | {"max_position_embeddings": 1024})
    )
    model.save_pretrained(folder)
    return folder


def of_granite(folder, **changes):
    text = {
        "weights": str(folder),
        "layers": ["mamba2", "mlp", "attention", "mlp"] * 2,
        "hidden_size": 32,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 16,
        "n_groups": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_head_dim": 8,
        "mlp_size": 48,
        "chunk_size": 8,
    }
    return load_recipe(
        "quickstart", [f"model.text={json.dumps(text | changes)}", "model.vision.towers.0.weights=random"]
    )


def test_a_recipe_starts_from_a_granite_and_keeps_what_it_multiplies(granite, tmp_path):
    recipe = of_granite(granite)
    check_weights(recipe.model)
    tiny_tokenizer().save_pretrained(tmp_path / "data" / "tokenizer")
    build_initial(recipe, tmp_path / "data", tmp_path / "initial")
    text = json.loads((tmp_path / "initial" / "config.json").read_text())["text_config"]
    assert (text["residual_multiplier"], text["logits_scaling"], text["max_position_embeddings"]) == (0.22, 3.0, 1024)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_size": 64}, "has mlp_size 48, the recipe says mlp_size 64; set them to the checkpoint's"),
        (
            {"layers": ["mamba2", "mlp"] * 4},
            r"has layers mamba2-mlp-attention-mlp... \(2 mamba2, 4 mlp, 2 attention\), the",
        ),
        ({"layers": None, "num_hidden_layers": 8}, r"the recipe says layers None"),
    ],
)
def test_layers_that_do_not_fit_the_weights_are_named_with_both_sides(granite, tmp_path, changes, message):
    tiny_tokenizer().save_pretrained(tmp_path / "data" / "tokenizer")
    with pytest.raises(UsageError, match=message):
        build_initial(of_granite(granite, **changes), tmp_path / "data", tmp_path / "initial")
    assert not (tmp_path / "initial").exists()


def test_preflight_knows_the_sizes_and_families_of_checkpoints(granite, tmp_path):
    with pytest.raises(UsageError, match="has num_hidden_layers 8, the recipe says 4"):
        check_weights(of_granite(granite, layers=["mamba2", "mlp", "attention", "mlp"]).model)
    config = json.loads((granite / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
    with pytest.raises(UsageError, match="num_local_experts is 4: mixtures of experts are not supported"):
        check_weights(of_granite(tmp_path).model)
