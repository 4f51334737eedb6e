"""Dropout of a stage: at the places of what trains, in training alone, and nowhere at 0."""

import pytest
import torch

from tests.helpers.tiny import HYBRID, prompt, tiny_model
from workflows.recipe.train import StageRecipe
from workflows.train.dropout import add_dropout


def stage(dropout: float, *trains: str) -> StageRecipe:
    return StageRecipe(name="s", trains=trains, steps=1, learning_rate=1.0, batch_rows=1, dropout=dropout)


def outputs(model, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    pixels = torch.randint(0, 255, (1, 3, *[model.config.vision_config.image_size] * 2), dtype=torch.uint8)
    torch.manual_seed(seed)
    return model(input_ids=prompt(9, 1), pixel_values=pixels, use_cache=False).logits


@pytest.mark.parametrize("options", [{}, {"text": HYBRID}], ids=["mamba2", "hybrid"])
def test_it_drops_in_training_and_not_in_evaluation(options):
    model = tiny_model(**options)
    blocks = len(model.language_model.backbone.layers)
    before = outputs(model.eval(), 1)
    assert add_dropout(model, stage(0.5, "connector", "language_model")) == blocks + 1
    assert torch.equal(outputs(model.eval(), 1), before)
    model.train()
    assert torch.equal(outputs(model, 1), outputs(model, 1))
    assert not torch.allclose(outputs(model, 1), before)


def test_parts_that_are_frozen_drop_nothing():
    model = tiny_model()
    blocks = len(model.language_model.backbone.layers)
    assert add_dropout(model, stage(0.0, "connector", "language_model")) == 0
    assert not model.connector._forward_hooks
    assert add_dropout(model, stage(0.1, "connector")) == 1
    assert add_dropout(tiny_model(), stage(0.1, "language_model")) == blocks
