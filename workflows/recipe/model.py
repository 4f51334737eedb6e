"""The recipe's model: vision encoders, connector, language model."""

from typing import Literal

from pydantic import Field, model_validator

from mlmamba.presets import PRESETS, with_preset
from pipelines.config import StrictModel


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
