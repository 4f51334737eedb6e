"""The recipe's training stages and how they run."""

from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import DataConfig, StrictModel

PARTS = ("vision", "connector", "language_model")


class StageRecipe(StrictModel):
    """One training stage. What it trains, what is frozen and what is saved follow from `trains` alone:
    the other parts are frozen, and every export holds the whole model."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    """Name in folders, logs and --stage."""
    trains: list[Literal["vision", "connector", "language_model"]] = Field(min_length=1)
    """The parts that train."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the rows; or give steps."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps; or give epochs."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate; cosine to zero after the warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay; never on biases, norms, A_log, dt_bias and D."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps with linearly rising learning rate."""
    batch_rows: int = Field(gt=0)
    """Packed rows in one optimizer step, over all workers."""
    micro_batch_rows: int = Field(1, gt=0)
    """Packed rows that one worker runs at once; the rest is accumulated."""
    clip: float = Field(1.0, ge=0)
    """Global gradient norm limit; 0 for none."""
    data: DataConfig | None = None
    """Data set of this stage alone, or the name of a data recipe, as the paper has one for the connector and one for
    the rest. Absent: the recipe's. The tokenizer must be the same."""

    @model_validator(mode="after")
    def _one_length(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self


class TrainRecipe(StrictModel):
    """How the stages run."""

    workers: int = Field(gt=0)
    """Ray Train workers; with GPUs, one GPU each."""
    cpus_per_worker: int = Field(1, gt=0)
    """CPU cores, and torch threads, of one worker."""
    gpus_per_worker: Literal[0, 1] = 0
    """1 on a GPU cluster."""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type. A_log, dt_bias, D and the recurrent state stay float32."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    save_every: int = Field(100, gt=0)
    """Optimizer steps between checkpoints."""
    log_every: int = Field(10, gt=0)
    """Optimizer steps between logged metrics."""
    max_failures: int = Field(2, ge=0)
    """How often a stage is restarted from its last checkpoint when a worker dies."""
    stages: list[StageRecipe] = Field(min_length=1)
    """The stages, in order."""

    @model_validator(mode="after")
    def _check(self):
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]!r}")
        for stage in self.stages:
            per_pass = self.workers * stage.micro_batch_rows
            if stage.batch_rows % per_pass:
                raise ValueError(
                    f"stage {stage.name!r}: batch_rows = {stage.batch_rows} does not divide into "
                    f"workers x micro_batch_rows = {self.workers} x {stage.micro_batch_rows} = {per_pass}"
                )
        return self
