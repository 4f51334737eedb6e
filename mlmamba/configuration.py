"""Configuration classes: the language model (transformers' own Mamba2Config), the vision encoders and the connector."""

from huggingface_hub.dataclasses import strict
from transformers import Mamba2Config, PreTrainedConfig

Mamba2TextConfig = Mamba2Config


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
    """

    model_type = "mlmamba_vision"

    towers: list[dict] | None = None
    image_size: int = 384
    grid: int | None = None


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
        "text_config": Mamba2Config,
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
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
