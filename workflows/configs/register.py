"""The recipe's entry in the model registry."""

from pydantic import Field

from pipelines.config import StrictModel


class RegisterRecipe(StrictModel):
    """Where the finished model goes in the MLflow registry."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Registered model name."""
    alias: str = Field("champion", pattern=r"^[a-z][a-z0-9_-]*$")
    """Alias that moves to the new version when the gate holds."""
