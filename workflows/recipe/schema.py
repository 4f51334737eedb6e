"""The typed recipe. A YAML file in workflows/recipes is an instance of `Recipe` and nothing else.

The string under a field documents it and is what the recipe reference is made from. Unknown keys are errors.
The parts are in the other files of workflows/recipe.
"""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from mlmamba.image_layout import ImageLayout
from pipelines.config import DataConfig, StrictModel
from pipelines.identity import Decides
from workflows.recipe.evaluate import EvaluateRecipe, RegisterRecipe
from workflows.recipe.model import ModelRecipe
from workflows.recipe.train import StageRecipe, TrainRecipe


class DataRecipe(StrictModel):
    """A data set by itself: `mlmamba prepare` makes it, and a recipe or stage can name it as its `data`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Name of the data set's folder."""
    seed: int = 7
    """Seed of the packing. A recipe that is to find the data set made has the same."""
    tokens_per_image: int | dict[str, int]
    """Tokens that the model which is to train on it has for an image: 729 for ML-Mamba's encoders at 384 px. Where the
    image's size decides, the fields that do: `patch`, `merge`, `min_tokens` and `max_tokens`; or `image_size`, `tokens`
    of one square, and `tiles`."""
    data: DataConfig
    """The data set."""

    @field_validator("tokens_per_image", mode="after")
    @classmethod
    def _tokens(cls, value):
        ImageLayout.of(value)  # raises
        return value


class Recipe(StrictModel):
    """A whole workflow: prepare, train, evaluate, register, promote."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Name in folders and runs."""
    experiment: Annotated[str | None, Decides.NOTHING] = Field(default=None, pattern=r"^\S(.*\S)?$", max_length=250)
    """MLflow experiment of the runs; the recipe's name by default. Recipes that are tries on one corpus name the same
    one, so that their runs stand in one table."""
    seed: int = 7
    """Seed of initialisation, packing and data order."""
    data: DataConfig
    """The data set, or the name of a data recipe (data/llava-665k)."""
    model: ModelRecipe
    """The model."""
    train: TrainRecipe
    """The training stages."""
    evaluate: Annotated[EvaluateRecipe, Decides.NOTHING] = EvaluateRecipe()
    """The evaluation."""
    register_as: Annotated[RegisterRecipe, Decides.NOTHING]
    """The registry entry."""

    @model_validator(mode="after")
    def _one_tokenizer(self):
        for stage in self.train.stages:
            if stage.data is not None and (stage.data.tokenizer != self.data.tokenizer or not self.data.tokenizer.name):
                raise ValueError(
                    f"stage {stage.name!r} has its own data: data.tokenizer.name must be set, and be the same there"
                )
        return self

    @model_validator(mode="after")
    def _best_of_something(self):
        for stage in self.train.stages:
            if stage.best and not self.data_of(stage).sources("validation"):
                raise ValueError(
                    f"stage {stage.name!r}: best chooses by the validation split, and its data has none: give "
                    "data.validation, or `validation: 0.1` to a source of data.train, or drop best"
                )
        return self

    @model_validator(mode="after")
    def _measured_on_cpus(self):
        if self.model.measured_chunks and self.train.gpus_per_worker:
            raise ValueError(
                f"chunk_size = auto (of {' and '.join(self.model.measured_chunks)}) is for workers on CPUs: on a GPU "
                "give a number, or leave it out"
            )
        return self

    def data_of(self, stage: StageRecipe) -> DataConfig:
        """The data set that a stage trains on."""
        return stage.data or self.data
