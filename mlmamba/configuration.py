"""Configuration classes: the language model (transformers' Mamba2Config and what hybrids add), encoders, connector."""

from huggingface_hub.dataclasses import strict
from transformers import Mamba2Config, PreTrainedConfig

from mlmamba.blocks import ACTIVATIONS, KINDS, MIXER_NORMS, check_blocks, has_attention
from mlmamba.image_layout import check_image_fields


@strict
class Mamba2TextConfig(Mamba2Config):
    """Language model: transformers' Mamba2Config, and what a hybrid of Mamba-2, attention and MLPs says besides.

    Without `layers` it is a pure Mamba-2 and nothing below counts. Every block is residual, with one norm and one
    mixer: what other families call a layer of a mixer and an MLP is two blocks here.

    Args:
        layers: kind of each block, of `mlmamba.blocks.KINDS`.
        num_attention_heads, num_key_value_heads, attention_head_dim: of attention; queries share keys in groups.
        attention_bias: whether its projections have one.
        max_position_embeddings: most tokens of a sequence, for which attention keeps keys and values.
        rope_theta: base of rotary positions; None for none.
        partial_rotary_factor: the part of a head that is rotated.
        mlp_size, mlp_bias: of an MLP: its inner width, and whether its projections have a bias.
        mlp_activation: "swiglu", gated, or "relu2", the square of relu (Nemotron-H), not gated.
        mixer_norm: of a Mamba-2 mixer: "gated" as ever, "before_gate" or "none" (Falcon-H1).
        embedding_multiplier, residual_multiplier, logits_scaling: Granite's (transformers' granitemoehybrid):
            embeddings and what a block adds are multiplied, logits are divided by it.
        attention_multiplier: Granite's scale of queries times keys; None for 1 / sqrt(head dim).
        ssm_multipliers: of z, x, B, C and dt, as in_proj gives them; ssm_out_multiplier: of what out_proj gives.
        attention_in_multiplier, key_multiplier, attention_out_multiplier: of attention's input, keys and output.
        mlp_multipliers: of the MLP's gate and output. These three lines are Falcon-H1's (transformers' falcon_h1).
    """

    layers: list[str] | None = None
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    attention_head_dim: int = 0
    attention_bias: bool = False
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float = 1.0
    mlp_size: int = 0
    mlp_bias: bool = False
    mlp_activation: str = "swiglu"
    mixer_norm: str = "gated"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_multiplier: float | None = None
    ssm_multipliers: list[float] | None = None
    ssm_out_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    key_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    mlp_multipliers: list[float] | None = None

    def validate_architecture(self):
        """Part of the @strict validation. A hybrid's Mamba-2 is as wide as its heads, whatever `expand` says."""
        if self.layers is None:
            super().validate_architecture()

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, known in (("mlp_activation", ACTIVATIONS), ("mixer_norm", MIXER_NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        check_blocks(self)

    @property
    def kinds(self) -> list[str]:
        """Kind of each block."""
        return ["mamba2"] * self.num_hidden_layers if self.layers is None else self.layers

    @property
    def room(self) -> int | None:
        """Most tokens of a sequence; None where no block keeps keys and values, and there is no most."""
        return self.max_position_embeddings if has_attention(self.layers) else None

    @property
    def keeps(self) -> list[bool]:
        """Of each state of a sequence, whether it keeps keys and values (attention) or is constant (Mamba-2)."""
        return [keeps for kind in self.kinds for keeps in KINDS[kind]]


def as_text_config(config: Mamba2Config) -> Mamba2TextConfig:
    """The same config; transformers' own Mamba2Config as one of ours."""
    if isinstance(config, Mamba2TextConfig):
        return config
    return Mamba2TextConfig.from_dict(config.to_dict())


@strict
class VisionConfig(PreTrainedConfig):
    """One or several timm encoders whose features are concatenated on channels.

    Args:
        towers: one dict per encoder, in the order of their channels. `model` is the timm name. A model of patch tokens
            (a ViT) takes `block`, the block whose output is used; -2, the second to last, is what the released code
            takes (the papers do not say). A model of feature maps takes `stages`, the indices of the maps to use;
            shallow maps keep colour, deep maps keep shape.
        image_size: side in pixels of the square image that every tower gets.
        grid: side of the feature grid in cells. Feature maps are resized to it and need it. Patches fix their grid:
            where all towers give patches it may be left out, and else it must be theirs.
        merge: so many features by so many become one of as many times the channels.
        tiles: most squares that a large image is cut into, besides the square that shows it whole.
        min_tokens, max_tokens: where the second is given, images are read at their own size and aspect, as at least and
            at most so many tokens (mlmamba/image_layout.py), and image_size and grid do not count.

    Raises:
        ValueError: the fields do not go together.
    """

    model_type = "mlmamba_vision"

    towers: list[dict] | None = None
    image_size: int = 384
    grid: int | None = None
    merge: int = 1
    tiles: int = 1
    min_tokens: int = 1
    max_tokens: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_image_fields(self)

    @property
    def native(self) -> bool:
        """Whether images are read at their own size."""
        return self.max_tokens is not None

    def to_dict(self) -> dict:
        """Without the fields about other images than squares where these are as ever: checkpoints stay as they were."""
        same = {name for name, value in _SQUARE.items() if getattr(self, name) == value}
        return {name: value for name, value in super().to_dict().items() if name not in same}


_SQUARE = {"merge": 1, "tiles": 1, "min_tokens": 1, "max_tokens": None}


@strict
class ConnectorConfig(PreTrainedConfig):
    """Connector between vision features and language model; the names are explained in mlmamba/connector.py.

    Args:
        name: one of `mlmamba.connector.CONNECTORS`.
        scan: "bsm" (forward and backward) or "csm" (rows, columns and both reversed).
        merge: how the scans are put together, "mean" or "sum".
        layout: of "msc_basic" and "msc_advanced": "paper" or "released".
        hidden_size: width of the MLP's hidden layer ("vss_l2": of the scan); None for the connector's own default.
        expand, head_dim, state_size, conv_kernel, chunk_size: of the Mamba-2 scan.
    """

    model_type = "mlmamba_connector"

    name: str = "msc_advanced"
    scan: str = "bsm"
    merge: str = "mean"
    layout: str = "paper"
    hidden_size: int | None = None
    expand: int = 2
    head_dim: int = 64
    state_size: int = 128
    conv_kernel: int = 4
    chunk_size: int = 64


@strict
class MLMambaConfig(PreTrainedConfig):
    """ML-Mamba: vision encoders, connector and Mamba-2 language model.

    Args:
        text_config, vision_config, connector_config: the three parts, as objects or dicts.
        image_token_id: id of the placeholder that stands for one feature vector of an image. For GPT-NeoX it is
            50277, the first of the unused rows that pad the embedding to 50,288.
        max_position_embeddings: longest sequence in tokens that the model was trained on; longer prompts are an error.
    """

    model_type = "mlmamba"
    sub_configs = {  # noqa: RUF012 - the name and form that transformers reads
        "text_config": Mamba2TextConfig,
        "vision_config": VisionConfig,
        "connector_config": ConnectorConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    connector_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 50277
    max_position_embeddings: int = 2777

    def __post_init__(self, **kwargs):
        for name, cls in self.sub_configs.items():
            value = getattr(self, name)
            if value is None or isinstance(value, dict):
                value = {k: v for k, v in (value or {}).items() if k != "model_type"}
                setattr(self, name, cls(**value))
        if (room := self.text_config.room) is not None and room < self.max_position_embeddings:
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}, the longest prompt, and attention has "
                f"room for {room} tokens (text_config.max_position_embeddings)"
            )
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
