"""The recipe's model: vision encoders, connector, language model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlmamba.blocks import check_blocks
from mlmamba.image_layout import check_image_fields
from mlmamba.presets import PRESETS, with_preset
from pipelines.config import StrictModel
from pipelines.identity import Decides
from workflows.recipe.train import AUTO, Measured, Part

UNMEASURED_CHUNK = 64
"""Of a scan whose chunk is measured, until it is."""


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
    merge: Annotated[int, Decides.WHEN_SET] = Field(1, gt=0)
    """So many features by so many become one token of as many times the channels: 2 for a quarter of the tokens."""
    tiles: Annotated[int, Decides.WHEN_SET] = Field(1, gt=0)
    """Most tiles of image_size that a large image is cut into, its aspect kept, besides the square that shows it whole
    (AnyRes). 1: the square alone."""
    min_tokens: Annotated[int, Decides.WHEN_SET] = Field(1, gt=0)
    """Least tokens of an image with max_tokens: a smaller one is enlarged."""
    max_tokens: Annotated[int | None, Decides.WHEN_SET] = Field(None, gt=0)
    """Images are read at their own size and aspect, one token for each square of patch x merge pixels, and made smaller
    where they would have more tokens than this. For NaFlex encoders and plain vision transformers; without it every
    image is resized to a square of image_size."""

    @model_validator(mode="after")
    def _one_way(self):
        check_image_fields(self)
        return self


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
    chunk_size: Measured = 64
    """Chunk of the scan on the torch path; speed only. `auto`: measured when a stage starts, as micro_batch_rows."""
    init: Annotated[Literal["torch", "balanced"], Decides.WHEN_SET] = "torch"
    """First weights of the projector: as torch draws them, which is what the papers' code has, or so that what differs
    between images is not drowned, and an image's embeddings are as large as a word's (mlmamba/connectors/base.py)."""

    @model_validator(mode="after")
    def _has_a_projector(self):
        if self.init == "balanced" and self.name == "vss_l2":
            raise ValueError("init: balanced is for projectors of several layers, and vss_l2 has none; leave it out")
        return self

    def sizes(self) -> dict:
        """The fields of the library's ConnectorConfig."""
        return self.model_dump(exclude={"init"}) | {"chunk_size": _before(self.chunk_size)}


class TextRecipe(StrictModel):
    """The language model: Mamba-2, or with `layers` a hybrid of Mamba-2, attention and MLPs."""

    weights: str = "random"
    """"random", or a folder or hub name of a Mamba-2 checkpoint in the layout of state-spaces
    (state-spaces/mamba2-2.7b) or of transformers, or of a hybrid in transformers' layout (granitemoehybrid, bamba,
    falcon_h1, nemotron_h). It must have the sizes below; the rest is as its config.json says."""
    hidden_size: int = Field(2560, gt=0)
    """Model width."""
    num_hidden_layers: int = Field(64, gt=0)
    """Blocks."""
    layers: Annotated[list[Literal["mamba2", "attention", "mlp", "both"]] | None, Decides.WHEN_SET] = None
    """Hybrids: what each block is; `both` is Mamba-2 beside attention. A layer of a mixer and an MLP, as most families
    have them, is two blocks. Without it every block is Mamba-2."""
    num_attention_heads: Annotated[int, Decides.WHEN_SET] = Field(0, ge=0)
    """Attention: heads of queries."""
    num_key_value_heads: Annotated[int, Decides.WHEN_SET] = Field(0, ge=0)
    """Attention: heads of keys and values, which queries share in groups."""
    attention_head_dim: Annotated[int, Decides.WHEN_SET] = Field(0, ge=0)
    """Attention: width of one head."""
    rope_theta: Annotated[float | None, Decides.WHEN_SET] = None
    """Attention: base of rotary positions; none without it, since Mamba-2 blocks know the order."""
    partial_rotary_factor: Annotated[float, Decides.WHEN_SET] = Field(1.0, gt=0, le=1)
    """Attention: the part of a head that is rotated."""
    max_position_embeddings: Annotated[int, Decides.WHEN_SET] = Field(8192, gt=0)
    """Attention: most tokens of a sequence, prompt and answer together, that keys and values are kept of."""
    mlp_size: Annotated[int, Decides.WHEN_SET] = Field(0, ge=0)
    """MLPs: inner width."""
    state_size: int = Field(128, gt=0)
    """State per channel."""
    num_heads: Annotated[int | None, Decides.WHEN_SET] = Field(None, gt=0)
    """Heads of Mamba-2; hidden_size x expand / head_dim when absent, and always without `layers`."""
    head_dim: int = Field(64, gt=0)
    """Width of one head."""
    expand: int = Field(2, gt=0)
    """Inner width over model width."""
    n_groups: int = Field(1, gt=0)
    """Groups that share B and C."""
    chunk_size: Measured = 256
    """Chunk of the scan; speed only. `auto`: measured when a stage starts, as micro_batch_rows."""
    vocab_multiple: int = Field(16, gt=0)
    """The embedding's rows are the tokenizer's entries rounded up to this."""

    @model_validator(mode="before")
    @classmethod
    def _count_blocks(cls, content):
        """`layers` says how many there are."""
        if isinstance(content, dict) and isinstance(content.get("layers"), list):
            return {"num_hidden_layers": len(content["layers"]), **content}
        return content

    @model_validator(mode="after")
    def _whole_heads(self):
        inner = self.hidden_size * self.expand
        if self.num_heads is None and inner % self.head_dim:
            raise ValueError(f"hidden_size x expand = {inner} is not a multiple of head_dim = {self.head_dim}")
        if self.layers is None and self.num_heads not in (None, inner // self.head_dim):
            raise ValueError(
                f"num_heads is {self.num_heads}; without layers it is hidden_size x expand / head_dim, "
                f"{inner / self.head_dim:g}"
            )
        check_blocks(self)
        return self

    @property
    def chunk(self) -> int:
        """Chunk of the scan, before one is measured where that is to be."""
        return _before(self.chunk_size)

    @property
    def heads(self) -> int:
        """Heads of a Mamba-2 block."""
        return self.num_heads or self.hidden_size * self.expand // self.head_dim


class ModelRecipe(StrictModel):
    """The model's parts."""

    preset: str | None = Field(None, exclude=True)
    """Name in mlmamba/presets.py (130m, 370m, 780m, 1.3b, 2.7b, granite-4.0-h-350m, -1b, -micro, tiny, tiny_maps) that
    gives what the parts below leave out."""
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

    @property
    def stated_tokens(self) -> int | None:
        """Tokens of an image where the recipe itself says them: one for each cell of its grid. None where encoders or a
        connector that pools must be asked, for which torch is needed."""
        side, vision = self.vision.grid, self.vision
        square = vision.merge == vision.tiles == 1 and vision.max_tokens is None
        return side * side if side and square and self.connector.name != "ldpv2" else None

    @property
    def measured_chunks(self) -> tuple[Part, ...]:
        """The parts whose scan's chunk is measured when a stage starts."""
        parts: dict[Part, int | str] = {
            "connector": self.connector.chunk_size,
            "language_model": self.text.chunk_size,
        }
        return tuple(part for part, chunk in parts.items() if chunk == AUTO)


def _before(chunk: int | str) -> int:
    return UNMEASURED_CHUNK if chunk == AUTO else chunk
