"""Named sizes of the model: the five Mamba-2 language models with ML-Mamba's encoders and connector, and two tiny ones.

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
    text = {**_TEXT, **parts["text"]}
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
    return merged
