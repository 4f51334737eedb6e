"""What the blocks of a language model may be, and what each kind needs to be given. Recipes read it, without torch."""

from typing import Any

KINDS = {"mamba2": (False,), "attention": (True,), "mlp": (), "both": (False, True)}
"""Kinds of a block's mixer, and its states (mlmamba/state.py): whether each keeps keys and values, which grow.
`both` is Mamba-2 beside attention."""
ACTIVATIONS = ("swiglu", "relu2")
"""Of an MLP: silu of one half times the other, or the square of relu (Nemotron-H)."""
MIXER_NORMS = ("gated", "before_gate", "none")
"""Of a Mamba-2 mixer: Mamba-2's own; or before the gate, or none (Falcon-H1)."""


def has_attention(layers: list[str] | None) -> bool:
    """Whether a model with these blocks keeps keys and values."""
    return layers is not None and not {"attention", "both"}.isdisjoint(layers)


def check_blocks(fields: Any) -> None:
    """Check the fields of a hybrid: of a config of the model, or of a recipe's text section.

    Raises:
        ValueError: there is no such kind of block, or what a kind needs is missing or does not fit.
    """
    if fields.layers is None:
        return
    if not fields.layers:
        raise ValueError("layers is empty; list what each block is, or leave it out for a pure Mamba-2")
    if unknown := sorted({*fields.layers} - {*KINDS}):
        raise ValueError(f"layers holds {unknown[0]!r}; a block is one of {', '.join(KINDS)}")
    if len(fields.layers) != fields.num_hidden_layers:
        raise ValueError(f"layers lists {len(fields.layers)} blocks, num_hidden_layers is {fields.num_hidden_layers}")
    if "mlp" in fields.layers and fields.mlp_size < 1:
        raise ValueError(f"layers has mlp blocks, and mlp_size is {fields.mlp_size}; give their inner width")
    if not has_attention(fields.layers):
        return
    heads, groups, width = fields.num_attention_heads, fields.num_key_value_heads, fields.attention_head_dim
    if min(heads, groups, width) < 1 or heads % groups:
        raise ValueError(
            f"layers has attention, with {heads} heads in {groups} groups of {width} channels; give "
            "num_attention_heads, num_key_value_heads that divide them, and attention_head_dim"
        )
    if not fields.max_position_embeddings or fields.max_position_embeddings < 1:
        raise ValueError("layers has attention, and max_position_embeddings is not given: the tokens it has room for")
    rotated = width * fields.partial_rotary_factor
    if fields.rope_theta is not None and (fields.rope_theta <= 0 or rotated < 2 or rotated % 2 or rotated > width):
        raise ValueError(
            f"rotary positions turn pairs of a head's {width} channels; rope_theta is {fields.rope_theta} and "
            f"partial_rotary_factor {fields.partial_rotary_factor}, which turns {rotated:g}"
        )
