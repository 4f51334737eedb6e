"""Named sizes of the model: Mamba-2 and Granite language models with ML-Mamba's encoders and connector; two tiny ones.

A preset says what the three parts are: "vision", "connector" and "text", with the field names of their configs. Recipes
take it as `model: {preset: 2.7b}`. What is not about size (weights, tokenizer, the longest row) is not in it.
"""

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlmamba.configuration import MLMambaConfig

# ML-Mamba sections 3.2 and 4.1. Channels in the order of the released code; the paper's equation 5 has SigLIP first.
PAPER_VISION = {
    "towers": [
        {"model": "vit_large_patch14_reg4_dinov2.lvd142m", "block": -2},
        {"model": "vit_so400m_patch14_siglip_384.webli", "block": -2},
    ],
    "image_size": 384,
}
PAPER_CONNECTOR = {"name": "msc_advanced", "scan": "bsm", "head_dim": 64, "state_size": 128}
# Blocks and width of state-spaces/mamba2-*; vocabulary: GPT-NeoX's 50,277 entries, `<image>`, and unused rows.
SIZES = {"130m": (24, 768), "370m": (48, 1024), "780m": (48, 1536), "1.3b": (48, 2048), "2.7b": (64, 2560)}
VOCABULARY, IMAGE_TOKEN_ID, LONGEST = 50_288, 50_277, 2777

# Dense Granite-4.0-H: layers, which of them have attention, width, heads of Mamba-2 and their width, heads of attention
# and of keys, inner width of the MLP. A layer is a mixer and an MLP, two blocks. From copies of their config.json; the
# MLP's width and the vocabulary were missing there and are inferred. 340,332,224, 1,461,538,368 and 3,191,396,096
# parameters; published as 350M, 1B and 3B.
GRANITE = {
    "granite-4.0-h-350m": (32, (10, 13, 17, 27), 768, 48, 32, 12, 4, 2048),
    "granite-4.0-h-1b": (40, (5, 15, 25, 35), 1536, 48, 64, 12, 4, 4096),
    "granite-4.0-h-micro": (40, (5, 15, 25, 35), 2048, 64, 64, 32, 8, 8192),
}


def _granite(
    layers: int, attention: tuple, width: int, heads: int, dim: int, queries: int, keys: int, mlp: int
) -> dict:
    """Sizes of the text part. The multipliers come with the weights."""
    return {
        "layers": [kind for i in range(layers) for kind in ("attention" if i in attention else "mamba2", "mlp")],
        "num_hidden_layers": 2 * layers,
        "hidden_size": width,
        "num_heads": heads,
        "head_dim": dim,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "attention_head_dim": width // queries,
        "mlp_size": mlp,
    }


_TINY_TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "head_dim": 8, "chunk_size": 4}
_TINY_CONNECTOR = {"name": "msc_advanced", "head_dim": 16, "state_size": 8, "chunk_size": 4, "hidden_size": 16}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    **{
        name: {
            "vision": PAPER_VISION,
            "connector": PAPER_CONNECTOR,
            "text": {"hidden_size": width, "num_hidden_layers": blocks},
        }
        for name, (blocks, width) in SIZES.items()
    },
    **{
        name: {"vision": PAPER_VISION, "connector": PAPER_CONNECTOR, "text": _granite(*sizes)}
        for name, sizes in GRANITE.items()
    },
    # For tests and first steps: patch tokens, and feature maps; 4 tokens an image.
    "tiny": {
        "vision": {"towers": [{"model": "test_vit", "block": -2}], "image_size": 32},
        "connector": _TINY_CONNECTOR,
        "text": _TINY_TEXT,
    },
    "tiny_maps": {
        "vision": {"towers": [{"model": "test_efficientnet", "stages": [0, 2]}], "image_size": 32, "grid": 2},
        "connector": _TINY_CONNECTOR,
        "text": _TINY_TEXT,
    },
}
# As in state-spaces/mamba2-*: what every preset has in common, and may override.
_TEXT = {"state_size": 128, "head_dim": 64, "expand": 2, "n_groups": 1, "chunk_size": 256, "tie_word_embeddings": True}
_HYBRID = {"max_position_embeddings": 8192}


def preset(
    name: str,
    vocab_size: int = VOCABULARY,
    image_token_id: int = IMAGE_TOKEN_ID,
    max_position_embeddings: int = LONGEST,
    **changes: dict[str, Any],
) -> "MLMambaConfig":
    """The MLMambaConfig of a preset.

    Args:
        name: one of `PRESETS`.
        vocab_size: rows of the embedding. GPT-NeoX's by default.
        image_token_id: id of `<image>`.
        max_position_embeddings: longest sequence in tokens; the default is the paper's 729 + 2048.
        changes: `vision`, `connector` or `text`: fields that differ from the preset's, as in
            `preset("1.3b", connector={"scan": "csm"})`.

    Raises:
        ValueError: there is no such preset.
        TypeError: `changes` names something that is no part of the model.
    """
    from mlmamba.configuration import MLMambaConfig  # not at the top: a recipe is read without transformers

    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    parts = with_preset(name, changes)
    if unknown := sorted(parts.keys() - PRESETS[name].keys()):
        raise TypeError(f"a preset has the parts {', '.join(PRESETS[name])}; there is no {unknown[0]!r}")
    text = {**_TEXT, **(_HYBRID if parts["text"].get("layers") else {}), **parts["text"]}
    text.setdefault("num_heads", text["hidden_size"] * text["expand"] // text["head_dim"])
    return MLMambaConfig(
        text_config={"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **text},
        vision_config=parts["vision"],
        connector_config=parts["connector"],
        image_token_id=image_token_id,
        max_position_embeddings=max_position_embeddings,
    )


def with_preset(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """The preset's parts with the fields of `parts` put over them; a list, such as the towers, is replaced whole."""
    merged = dict(parts)
    for part, fields in copy.deepcopy(PRESETS[name]).items():
        own = parts.get(part) or {}
        merged[part] = {**fields, **own} if isinstance(own, dict) else own
        if isinstance(own, dict) and "layers" in own:  # which says how many blocks there are
            merged[part] |= {"num_hidden_layers": own.get("num_hidden_layers", len(own["layers"] or ()))}
    return merged
