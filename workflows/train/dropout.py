"""Dropout of a training stage: on the connector's embeddings, and on what each block adds to the residual stream.

It belongs to the stage and not to the model, whose config and weights know nothing of it. The masks follow from seed,
step and rank (step.seed_step), so that a resumed stage draws the same ones; another number of workers draws others.
"""

from functools import partial

from torch import nn
from torch.nn import functional as F

from workflows.recipe.train import StageRecipe


def add_dropout(model: nn.Module, stage: StageRecipe) -> int:
    """Let the parts that a stage trains drop values while they train; none at 0. Returns at how many places."""
    places = []
    if stage.dropout and "connector" in stage.trains:
        places.append(model.connector)
    if stage.dropout and "language_model" in stage.trains:
        places += [layer.mixer for layer in model.language_model.backbone.layers]
    for place in places:
        place.register_forward_hook(partial(_drop, stage.dropout))
    return len(places)


def _drop(share: float, module: nn.Module, inputs, output):
    """A mixer gives its state besides, which is left alone."""
    if isinstance(output, tuple):
        return F.dropout(output[0], share, module.training), *output[1:]
    return F.dropout(output, share, module.training)
