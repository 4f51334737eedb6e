"""What the ablation's runs differ in (tests/benchmarks/studies/ablation.py), and the recipes and stages that follow."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mlmamba.configuration import ConnectorConfig
from mlmamba.connector import build_connector
from mlmamba.vision import measure
from workflows.evaluate.probe import count_parameters
from workflows.recipe.schema import Recipe
from workflows.recipe.train import StageRecipe
from workflows.train.initial import vision_config

MATCHED = "mlp, matched"
LARGEST = "msc_advanced/bsm"
"""The connector whose size MATCHED has: the recipe's own."""
CONNECTORS: dict[str, dict] = {
    "mlp": {"name": "mlp"},
    MATCHED: {"name": "mlp"},
    "msc_basic/bsm": {"name": "msc_basic", "scan": "bsm"},
    "msc_basic/csm": {"name": "msc_basic", "scan": "csm"},
    LARGEST: {"name": "msc_advanced", "scan": "bsm"},
    "msc_advanced/csm": {"name": "msc_advanced", "scan": "csm"},
}
"""Label to the fields of the recipe's connector; the hidden width of MATCHED comes from `matched_width`."""


@dataclass(frozen=True)
class Setting:
    """One run."""

    connector: str
    stage: bool
    """Whether the connector trains alone first."""
    seed: int
    """Of the first weights and of the order of rows."""


BLIND = Setting(LARGEST, True, 0)
"""The run that is also asked about other images."""


@dataclass(frozen=True)
class Series:
    """What all runs share."""

    recipe: str
    data: Path
    """The prepared data set."""
    lines: Path
    """File to which each finished run adds a line of JSON."""
    plan: str
    """Digest of what the scores depend on; lines of another are not of this series."""
    steps: int
    """Optimizer steps of a run, both stages together."""
    connector_steps: int
    """Those of the connector stage, where there is one."""
    batch_rows: int
    """Packed rows of a step."""

    def stages(self, recipe: Recipe, own_stage: bool) -> list[StageRecipe]:
        """The recipe's connector and full stage with these steps; without the first, its steps go to the second."""
        connector, full = recipe.train.stages
        own = self.connector_steps if own_stage else 0
        lengths = [(connector, own), (full, self.steps - own)]
        changes = {"epochs": None, "batch_rows": self.batch_rows}
        return [stage.model_copy(update={"steps": n, **changes}) for stage, n in lengths if n]


def variant(recipe: Recipe, setting: Setting) -> Recipe:
    """The recipe with the setting's connector and seed. Its data set is the recipe's own all the same."""
    connector = recipe.model.connector.model_copy(update=connector_fields(recipe, setting.connector))
    model = recipe.model.model_copy(update={"connector": connector})
    return recipe.model_copy(update={"model": model, "seed": setting.seed})


def connector_fields(recipe: Recipe, label: str) -> dict:
    """The fields in which a connector differs from the recipe's."""
    fields = CONNECTORS[label]
    return {**fields, "hidden_size": matched_width(recipe)} if label == MATCHED else fields


def matched_width(recipe: Recipe) -> int:
    """Hidden width that gives the MLP as many parameters as LARGEST has; they grow evenly with it."""
    one, two = (parameters(recipe, {"name": "mlp", "hidden_size": width}) for width in (1, 2))
    return 1 + round((parameters(recipe, CONNECTORS[LARGEST]) - one) / (two - one))


def parameters(recipe: Recipe, fields: dict) -> int:
    """Parameters of the recipe's connector with some fields replaced; allocates none."""
    config = ConnectorConfig(**recipe.model.connector.model_dump() | fields)
    channels, _ = measure(vision_config(recipe.model))
    with torch.device("meta"):
        return count_parameters(build_connector(channels, recipe.model.text.hidden_size, config))
