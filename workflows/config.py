"""The typed recipe. A YAML file in workflows/recipes is an instance of `Recipe` and nothing else.

The string under a field documents it and is what the recipe reference is made from. Unknown keys are errors.
"""

import hashlib
import json
from typing import Literal

from pydantic import Field, model_validator

from mlmamba.presets import PRESETS, with_preset
from pipelines.config import DataConfig, StrictModel

PARTS = ("vision", "connector", "language_model")


class TowerConfig(StrictModel):
    """One timm vision encoder."""

    model: str
    """timm name of the encoder."""
    block: int | None = None
    """Patch-token models: the block whose output is used; -2 is the second to last, the papers' choice."""
    stages: list[int] | None = None
    """Feature-map models: indices of the maps that are used."""
    weights: str = "hub"
    """"hub" (timm fetches them), "random", a checkpoint file, or package:PACKAGE/PATH for a file inside a package."""

    @model_validator(mode="after")
    def _one_output(self):
        if (self.block is None) == (self.stages is None):
            raise ValueError("give either block (patch tokens) or stages (feature maps)")
        return self


class VisionRecipe(StrictModel):
    """The vision encoders; several are fused on channels."""

    towers: list[TowerConfig] = Field(min_length=1)
    """The encoders, in the order in which their channels are concatenated."""
    image_size: int = Field(384, gt=0)
    """Side in pixels of the encoders' input."""
    grid: int | None = Field(None, gt=0)
    """Feature-map models: side in cells of the grid that the maps are resized to."""


class ConnectorRecipe(StrictModel):
    """The connector between vision and language."""

    name: Literal["mlp", "msc_basic", "msc_advanced", "vl_mlp", "vss_mlp", "vss_l2", "fused_mlp", "ldpv2"] = (
        "msc_advanced"
    )
    """ML-Mamba's mlp and Mamba-2 Scan Connector without (msc_basic) or with SwiGLU (msc_advanced); VL-Mamba's vl_mlp,
    vss_mlp and vss_l2; Cobra's fused_mlp and ldpv2, which leaves a quarter of the tokens (mlmamba/connector.py)."""
    scan: Literal["bsm", "csm"] = "bsm"
    """Bidirectional scan or cross scan."""
    merge: Literal["mean", "sum"] = "mean"
    """How the directions of the scan are put together."""
    layout: Literal["paper", "released"] = "paper"
    """Of msc_basic and msc_advanced: where paper and released code differ, which to follow."""
    hidden_size: int | None = Field(None, gt=0)
    """Width of the projector's hidden layer (vss_l2: of the scan); the connector's own default when absent."""
    head_dim: int = Field(64, gt=0)
    """Width of one head of the scan."""
    state_size: int = Field(128, gt=0)
    """State per channel of the scan."""
    chunk_size: int = Field(64, gt=0)
    """Chunk of the scan on the torch path; speed only."""


class TextRecipe(StrictModel):
    """The Mamba-2 language model."""

    weights: str = "random"
    """"random", or a folder or hub name of a Mamba-2 checkpoint in the layout of state-spaces
    (state-spaces/mamba2-2.7b) or of transformers. It must have the sizes below; the rest is as its config.json says."""
    hidden_size: int = Field(2560, gt=0)
    """Model width."""
    num_hidden_layers: int = Field(64, gt=0)
    """Blocks."""
    state_size: int = Field(128, gt=0)
    """State per channel."""
    head_dim: int = Field(64, gt=0)
    """Width of one head."""
    expand: int = Field(2, gt=0)
    """Inner width over model width."""
    n_groups: int = Field(1, gt=0)
    """Groups that share B and C."""
    chunk_size: int = Field(256, gt=0)
    """Chunk of the scan; speed only."""
    vocab_multiple: int = Field(16, gt=0)
    """The embedding's rows are the tokenizer's entries rounded up to this."""

    @model_validator(mode="after")
    def _whole_heads(self):
        inner = self.hidden_size * self.expand
        if inner % self.head_dim:
            raise ValueError(f"hidden_size x expand = {inner} is not a multiple of head_dim = {self.head_dim}")
        return self


class ModelRecipe(StrictModel):
    """The model's parts."""

    preset: str | None = Field(None, exclude=True)
    """Name in mlmamba/presets.py (130m, 370m, 780m, 1.3b, 2.7b, tiny, tiny_maps) that gives what the parts below leave
    out."""
    vision: VisionRecipe
    """Vision encoders."""
    connector: ConnectorRecipe = ConnectorRecipe()
    """Connector."""
    text: TextRecipe
    """Language model."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, content):
        name = content.get("preset") if isinstance(content, dict) else None
        if name is None:
            return content
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
        return with_preset(name, content)


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


class RegisterRecipe(StrictModel):
    """Where the finished model goes in the MLflow registry."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Registered model name."""
    alias: str = Field("champion", pattern=r"^[a-z][a-z0-9_-]*$")
    """Alias that moves to the new version when the gate holds."""


class DataRecipe(StrictModel):
    """A data set by itself: `mlmamba prepare` makes it, and a recipe or stage can name it as its `data`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Name of the data set's folder."""
    seed: int = 7
    """Seed of the packing. A recipe that is to find the data set made has the same."""
    tokens_per_image: int = Field(gt=0)
    """Tokens that the model which is to train on it has for a picture: 729 for ML-Mamba's encoders at 384 px."""
    data: DataConfig
    """The data set."""


class Recipe(StrictModel):
    """A whole workflow: prepare, train, evaluate, register, promote."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Name in folders and runs."""
    seed: int = 7
    """Seed of initialisation, packing and data order."""
    data: DataConfig
    """The data set, or the name of a data recipe (data/llava-665k)."""
    model: ModelRecipe
    """The model."""
    train: TrainRecipe
    """The training stages."""
    evaluate: EvaluateRecipe = EvaluateRecipe()
    """The evaluation."""
    register_as: RegisterRecipe
    """The registry entry."""

    @model_validator(mode="after")
    def _one_tokenizer(self):
        for stage in self.train.stages:
            if stage.data is not None and (stage.data.tokenizer != self.data.tokenizer or not self.data.tokenizer.name):
                raise ValueError(
                    f"stage {stage.name!r} has its own data: data.tokenizer.name must be set, and be the same there"
                )
        return self

    def data_of(self, stage: StageRecipe) -> DataConfig:
        """The data set that a stage trains on."""
        return stage.data or self.data


def digest(*parts: object) -> str:
    """Ten hex digits that change when any of the JSON-able parts does."""
    text = json.dumps(parts, sort_keys=True, default=lambda model: model.model_dump(mode="json"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]
