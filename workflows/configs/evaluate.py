"""The recipe's evaluation and the gate before promotion."""

from pydantic import Field

from pipelines.config import StrictModel


class EvaluateRecipe(StrictModel):
    """How the test sources are scored."""

    workers: int = Field(1, gt=0)
    """Processes that answer questions."""
    cpus_per_worker: int = Field(1, gt=0)
    """CPU cores, and torch threads, of one process."""
    batch_pictures: int = Field(16, gt=0)
    """Pictures in one batch, with all their questions. Changes speed only."""
    max_new_tokens: int = Field(8, gt=0)
    """Longest answer in tokens."""
    gate: dict[str, float] = Field(default_factory=dict)
    """Least score by name for promotion: "overall", a question type, or "margin_over_blind"."""
