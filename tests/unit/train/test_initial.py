"""The initial model of a recipe: pretrained language models of either layout, on which recipe and model must agree."""

import json

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from mlmamba.loading import load_model
from tests.helpers.checkpoints import STATE_SPACES, language, random, write_state_spaces
from tests.helpers.tiny import tiny_tokenizer
from workflows.errors import UsageError
from workflows.recipe.load import load_recipe
from workflows.recipe.schema import Recipe
from workflows.train.initial import build_initial, image_tokens

TOWERS = [{"model": "test_vit", "block": -2, "weights": "random"}]


def recipe_of(weights="random", text: dict | None = None, **model) -> Recipe:
    model = {"preset": "tiny", "vision": {"towers": TOWERS}, "text": {"weights": str(weights), **(text or {})}, **model}
    return load_recipe("quickstart", [f"model={json.dumps(model)}"])


@pytest.fixture
def build(tmp_path):
    """Builds the model of a recipe, with a tokenizer of 258 entries."""
    tiny_tokenizer().save_pretrained(tmp_path / "data" / "tokenizer")

    def run(recipe: Recipe):
        build_initial(recipe, tmp_path / "data", tmp_path / "initial")
        return load_model(tmp_path / "initial", "cpu")

    return run


def test_a_recipe_starts_from_a_state_spaces_checkpoint(tmp_path, build):
    tensors = write_state_spaces(tmp_path / "lm", torch.bfloat16)
    model, processor = build(recipe_of(tmp_path / "lm"))
    own = model.language_model.state_dict()
    assert own["lm_head.weight"].shape == (272, 16)
    assert torch.equal(own["backbone.embeddings.weight"][:256], tensors["backbone.embedding.weight"].float())
    others = [name for name in tensors if name.startswith("backbone.") and "embedding" not in name]
    assert len(others) == 19
    assert all(torch.equal(own[name], tensors[name].float()) for name in others)
    assert processor.tokens_per_image == 4


def test_a_recipe_starts_from_a_transformers_checkpoint_and_keeps_what_it_does_not_say(tmp_path, build):
    config = Mamba2Config(
        vocab_size=258, hidden_size=16, num_hidden_layers=2, state_size=8, head_dim=8, num_heads=4, n_groups=1,
        conv_kernel=5, use_bias=True, time_step_limit=(0.01, 0.5), tie_word_embeddings=False,
    )  # fmt: skip
    theirs = Mamba2ForCausalLM(config)
    theirs.save_pretrained(tmp_path / "lm")
    model, _ = build(recipe_of(tmp_path / "lm"))
    text = model.config.text_config
    assert (text.conv_kernel, text.use_bias, tuple(text.time_step_limit)) == (5, True, (0.01, 0.5))
    assert torch.equal(model.get_output_embeddings().weight[:258], theirs.lm_head.weight)
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({}, {"hidden_size": 32}, "has hidden_size 16, the recipe says hidden_size 32; set them to the checkpoint's"),
        ({"n_layer": 3}, {}, "has num_hidden_layers 3, the recipe says num_hidden_layers 2"),
        ({"vocab_size": 300}, {}, "has a vocabulary of 304 rows, more than the model's 272.*model.text.vocab_multiple"),
    ],
)
def test_a_checkpoint_of_another_size_is_named_with_both_sides(tmp_path, build, changes, text, message):
    write_state_spaces(tmp_path / "lm", **changes)
    tensors = language(random(), 16, changes.get("n_layer", 2), 304 if "vocab_size" in changes else 256, 8, 8)
    torch.save(tensors, tmp_path / "lm" / "pytorch_model.bin")
    with pytest.raises(UsageError, match=message):
        build(recipe_of(tmp_path / "lm", text))
    assert not (tmp_path / "initial").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "holds no model"), ({"model_type": "llama"}, "model_type is 'llama'"), (STATE_SPACES, "holds no weights")],
)
def test_weights_that_are_not_there_or_something_else_are_usage_errors(tmp_path, build, config, message):
    (tmp_path / "lm").mkdir()
    if config:
        (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=rf"model\.text\.weights: cannot load .*{message}"):
        build(recipe_of(tmp_path / "lm"))


def test_a_connector_that_leaves_fewer_tokens_is_known_to_preparation_and_processor(build):
    recipe = recipe_of(connector={"name": "ldpv2"}, vision={"towers": TOWERS, "image_size": 48})
    assert image_tokens(recipe.model) == 4  # of 3 x 3
    model, processor = build(recipe)
    assert processor.tokens_per_image == 4
    features = model.get_image_features(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    assert features.shape[:2] == (1, 4)


def test_encoders_and_connectors_that_do_not_exist_or_fit_are_usage_errors_before_any_work():
    with pytest.raises(UsageError, match=r"model\.vision: timm .* has no model 'test_vitt'; did you mean"):
        image_tokens(recipe_of(vision={"towers": [{"model": "test_vitt", "block": -2}]}).model)
    with pytest.raises(UsageError, match=r"model\.vision: .*cannot read images of 40 pixels"):
        image_tokens(recipe_of(vision={"towers": TOWERS, "image_size": 40}).model)
    with pytest.raises(UsageError, match=r"model\.connector: scan width 2 x 64 = 128 is not a multiple of head_dim 24"):
        image_tokens(recipe_of(connector={"head_dim": 24}).model)
