"""Presets: the published sizes by their parameters, on the meta device; the tiny ones run; recipes start from them."""

import pytest
import torch
from pydantic import ValidationError

from mlmamba.connector import tokens_per_image
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import PRESETS, SIZES, preset
from tests.helpers.tiny import TEXT, TINY, images, prompt, tiny_config
from workflows.errors import UsageError
from workflows.recipe.load import load_recipe
from workflows.recipe.model import ModelRecipe

# Millions, from the shapes; 2.7b is the figure of paper.md 1.4.
LANGUAGE = {"130m": 129.0, "370m": 368.3, "780m": 780.2, "1.3b": 1343.8, "2.7b": 2702.6}
VISION = 731_940_928  # DINOv2-L at 384 px 303,715,328 and SigLIP-SO400M 428,225,600


def language_parameters(blocks: int, d: int, rows: int = 50_288) -> int:
    inner, state = 2 * d, 128
    heads, conv = inner // 64, inner + 2 * state
    mixer = d * (inner + conv + heads) + 5 * conv + 3 * heads + inner + inner * d
    return rows * d + blocks * (mixer + d) + d


@pytest.mark.parametrize("name", SIZES)
def test_a_size_has_the_parameters_that_its_table_says(name):
    config = preset(name)
    text = config.text_config
    assert (text.num_hidden_layers, text.hidden_size) == SIZES[name]
    assert (text.vocab_size, config.image_token_id, config.max_position_embeddings) == (50_288, 50_277, 729 + 2048)
    with torch.device("meta"):
        model = MLMambaForConditionalGeneration(config)
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    assert counts["language_model"] == language_parameters(*SIZES[name])
    assert round(counts["language_model"] / 1e6, 1) == LANGUAGE[name]
    assert counts["vision"] == VISION
    assert tokens_per_image(config) == 729
    assert type(model.connector).__name__ == "MSCAdvanced"
    assert model.vision.channels == 2176


def test_the_sizes_are_those_of_the_published_models():
    assert SIZES == {"130m": (24, 768), "370m": (48, 1024), "780m": (48, 1536), "1.3b": (48, 2048), "2.7b": (64, 2560)}


def test_the_released_connector_in_a_preset_has_its_184_million():
    with torch.device("meta"):
        model = MLMambaForConditionalGeneration(preset("2.7b", connector={"layout": "released"}))
    assert round(sum(p.numel() for p in model.connector.parameters()) / 1e6, 1) == 184.4


def test_changes_go_over_the_preset_and_leave_it_as_it_was():
    before = repr(PRESETS)
    config = preset("1.3b", connector={"scan": "csm"}, vision={"towers": [{"model": "test_vit", "block": -1}]})
    assert (config.connector_config.scan, config.connector_config.name) == ("csm", "msc_advanced")
    assert config.vision_config.towers == [{"model": "test_vit", "block": -1}]
    assert (config.vision_config.image_size, config.text_config.hidden_size) == (384, 2048)
    config.vision_config.towers[0]["block"] = 0
    preset("1.3b").vision_config.towers[0]["block"] = 0
    assert repr(PRESETS) == before


def test_unknown_presets_and_parts_are_refused():
    with pytest.raises(
        ValueError, match=r"unknown preset '3b'; choose one of 130m, .*2\.7b, granite-4.0-h-350m, .*, tiny, tiny_maps"
    ):
        preset("3b")
    with pytest.raises(TypeError, match="the parts vision, connector, text; there is no 'visoin'"):
        preset("2.7b", visoin={})


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "tiny_maps"])
def test_the_tiny_ones_run(name):
    config = preset(name, vocab_size=264, image_token_id=1, max_position_embeddings=64)
    assert tokens_per_image(config) == 4
    model = MLMambaForConditionalGeneration(config).eval()
    assert model(prompt(8, images=1), images(1)).logits.shape == (1, 8, 264)


def test_the_other_tests_use_the_tiny_preset():
    ours, theirs = tiny_config(), preset("tiny", vocab_size=264, image_token_id=1, max_position_embeddings=64)
    assert TINY is PRESETS["tiny"]
    assert {name: getattr(theirs.text_config, name) for name in TEXT} == TEXT
    assert ours.to_dict() == theirs.to_dict()


def test_a_recipe_starts_from_a_preset_and_what_it_says_goes_first():
    model = ModelRecipe.model_validate(
        {"preset": "370m", "connector": {"scan": "csm"}, "text": {"weights": "state-spaces/mamba2-370m"}}
    )
    assert [tower.model_dump(exclude_none=True) for tower in model.vision.towers] == [
        {**tower, "weights": "hub"} for tower in PRESETS["370m"]["vision"]["towers"]
    ]
    assert (model.connector.name, model.connector.scan) == ("msc_advanced", "csm")
    assert (model.text.hidden_size, model.text.num_hidden_layers) == (1024, 48)
    assert model.text.weights == "state-spaces/mamba2-370m"


def test_a_preset_is_the_same_recipe_as_its_fields_written_out():
    """So that a run is found again, whichever way the recipe says it."""
    short = ModelRecipe.model_validate({"preset": "130m"})
    assert ModelRecipe.model_validate(short.model_dump()).model_dump() == short.model_dump()
    assert "preset" not in short.model_dump()


def test_a_wrong_preset_or_field_in_a_recipe_is_named():
    with pytest.raises(UsageError, match=r"model: there is no preset '3b'; choose one of 130m, "):
        load_recipe("paper", ["model.preset=3b"])
    with pytest.raises(ValidationError, match="text"):
        ModelRecipe.model_validate({"preset": "130m", "text": "large"})
    with pytest.raises(ValidationError, match="vision"):
        ModelRecipe.model_validate({"text": {}})


def test_the_papers_recipe_is_the_papers_preset():
    recipe = load_recipe("paper").model
    assert (recipe.preset, recipe.text.weights) == ("2.7b", "state-spaces/mamba2-2.7b")
    assert load_recipe("paper", ["model.preset=130m"]).model.text.num_hidden_layers == 24
