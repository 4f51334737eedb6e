"""The base of all config and manifest models."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Unknown keys are errors, and the string under a field documents it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
