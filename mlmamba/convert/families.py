"""Hybrid language models in the layouts of transformers' families, as configs and tensor names of this library.

What a family calls a layer, a mixer and then an MLP, is two blocks here, each with its norm. Queries, keys and values
are one tensor, and so are the gate and the other half of an MLP. Sources: configuration_*.py and modeling_*.py of the
family in transformers. Left out: Zamba2, whose shared blocks read the embeddings again through adapters of their own,
which would be a second model file; and every mixture of experts.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from mlmamba.configuration import Mamba2TextConfig

_KINDS = {"linear_attention": "mamba2", "full_attention": "attention", "mlp": "mlp", "hybrid": "both"}
_MIXER = {
    "mamba.": (0, "mixer."),
    "self_attn.o_proj.": (0, "mixer.out_proj."),
    "self_attn.q_proj.": (0, "mixer.in_proj.", 0, 3),
    "self_attn.k_proj.": (0, "mixer.in_proj.", 1, 3),
    "self_attn.v_proj.": (0, "mixer.in_proj.", 2, 3),
    "input_layernorm.": (0, "norm."),
}
_MLP = {
    "feed_forward.gate_proj.": (1, "mixer.in_proj.", 0, 2),
    "feed_forward.up_proj.": (1, "mixer.in_proj.", 1, 2),
    "feed_forward.down_proj.": (1, "mixer.out_proj."),
    "pre_ff_layernorm.": (1, "norm."),
}
_OUTER = {
    "model.embed_tokens.weight": "backbone.embeddings.weight",
    "model.norm.weight": "backbone.norm_f.weight",
    "model.final_layernorm.weight": "backbone.norm_f.weight",
    "model.embeddings.weight": "backbone.embeddings.weight",
    "model.norm_f.weight": "backbone.norm_f.weight",
}


@dataclass(frozen=True)
class Family:
    """A family of hybrids.

    Attributes:
        text: what of its config is its own, as fields of ours.
        names: beginnings of tensor names inside a layer -> block of the layer and ours; for parts that are put together
            also their place and number.
        blocks: of a layer.
    """

    text: Callable[[PreTrainedConfig], dict]
    names: dict[str, tuple]
    blocks: int = 2


def _granite(config) -> dict:
    if config.num_local_experts:
        raise ValueError(
            f"num_local_experts is {config.num_local_experts}: mixtures of experts are not supported, dense models are "
            "(granite-4.0-h-350m, -1b, -micro)"
        )
    return {
        "mlp_size": config.shared_intermediate_size,
        "rope_theta": _theta(config) if config.position_embedding_type == "rope" else None,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling,
        "attention_multiplier": config.attention_multiplier,
    }


def _bamba(config) -> dict:
    return {
        "mlp_size": config.intermediate_size,
        "mlp_bias": config.mlp_bias,
        "rope_theta": _theta(config),
        "partial_rotary_factor": config.rope_parameters.get("partial_rotary_factor", 1.0),
    }


def _falcon(config) -> dict:
    if config.projectors_bias != config.mamba_proj_bias:
        raise ValueError("projectors_bias and mamba_proj_bias differ; this library's Mamba-2 has one use_bias")
    gate, down = config.mlp_multipliers
    return {
        "mlp_size": config.intermediate_size,
        "mlp_bias": config.mlp_bias,
        "rope_theta": _theta(config),
        "mixer_norm": ("before_gate" if config.mamba_norm_before_gate else "gated")
        if config.mamba_rms_norm
        else "none",
        "embedding_multiplier": config.embedding_multiplier,
        "logits_scaling": 1 / config.lm_head_multiplier,
        "ssm_multipliers": [config.ssm_in_multiplier * factor for factor in config.ssm_multipliers],
        "ssm_out_multiplier": config.ssm_out_multiplier,
        "attention_in_multiplier": config.attention_in_multiplier,
        "key_multiplier": config.key_multiplier,
        "attention_out_multiplier": config.attention_out_multiplier,
        "mlp_multipliers": [gate, down],
    }


def _nemotron(config) -> dict:
    if "moe" in config.layers_block_type:
        raise ValueError("layers_block_type has moe layers: mixtures of experts are not supported")
    if config.mlp_hidden_act != "relu2":
        raise ValueError(f"mlp_hidden_act is {config.mlp_hidden_act!r}; this library's ungated MLP has 'relu2' only")
    return {
        "mlp_size": config.intermediate_size,
        "mlp_bias": config.mlp_bias,
        "mlp_activation": "relu2",
        "num_heads": config.mamba_num_heads,
        "head_dim": config.mamba_head_dim,
        "state_size": config.ssm_state_size,
        "n_groups": config.n_groups,
        "conv_kernel": config.conv_kernel,
        "use_conv_bias": config.use_conv_bias,
        "use_bias": config.use_bias,
        "chunk_size": config.chunk_size,
        "expand": config.expand,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "attention_head_dim": config.head_dim,
        "attention_bias": False,
    }


FAMILIES = {
    "granitemoehybrid": Family(
        _granite,
        _MIXER
        | {
            "shared_mlp.input_linear.": (1, "mixer.in_proj."),
            "shared_mlp.output_linear.": (1, "mixer.out_proj."),
            "post_attention_layernorm.": (1, "norm."),
        },
    ),
    "bamba": Family(_bamba, _MIXER | _MLP),
    "falcon_h1": Family(
        _falcon,
        {name: (at, new.replace("mixer.", "mixer.attention."), *i) for name, (at, new, *i) in _MIXER.items()}
        | {"mamba.": (0, "mixer.mamba.")}
        | _MLP,
    ),
    "nemotron_h": Family(
        _nemotron,
        {
            "mixer.o_proj.": (0, "mixer.out_proj."),
            "mixer.q_proj.": (0, "mixer.in_proj.", 0, 3),
            "mixer.k_proj.": (0, "mixer.in_proj.", 1, 3),
            "mixer.v_proj.": (0, "mixer.in_proj.", 2, 3),
            "mixer.up_proj.": (0, "mixer.in_proj."),
            "mixer.down_proj.": (0, "mixer.out_proj."),
            "mixer.": (0, "mixer."),
            "norm.": (0, "norm."),
        },
        blocks=1,
    ),
}
"""By transformers' model_type."""


def from_family(file: str | Path) -> Mamba2TextConfig:
    """Our config of a hybrid, of its config.json.

    Raises:
        ValueError: it has something that config fields here cannot say; one line, with the field and its value.
    """
    try:
        return _text_config(AutoConfig.from_pretrained(file))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _text_config(config: PreTrainedConfig) -> Mamba2TextConfig:
    family = FAMILIES[config.model_type]
    if unknown := [kind for kind in config.layers_block_type if kind not in _KINDS and kind != "moe"]:
        raise ValueError(f"a layer is of type {unknown[0]!r}; known are {', '.join(_KINDS)}")
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError(f"sliding_window is {config.sliding_window}; attention here sees the whole sequence")
    act = getattr(config, "hidden_act", None) or config.mamba_hidden_act
    if act not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {act!r}; this library's Mamba-2 has 'silu' only")
    own = family.text(config)
    if family.blocks == 1:
        layers = [_KINDS[kind] for kind in config.layers_block_type]
    else:
        layers = [block for kind in config.layers_block_type for block in (_KINDS[kind], "mlp")]
    if "num_heads" not in own:
        own |= {
            "num_heads": config.mamba_n_heads,
            "head_dim": config.mamba_d_head,
            "state_size": config.mamba_d_state,
            "n_groups": config.mamba_n_groups,
            "conv_kernel": config.mamba_d_conv,
            "use_conv_bias": config.mamba_conv_bias,
            "use_bias": config.mamba_proj_bias,
            "chunk_size": config.mamba_chunk_size,
            "expand": config.mamba_expand,
            "layer_norm_epsilon": config.rms_norm_eps,
            "attention_head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "attention_bias": config.attention_bias,
        }
    return Mamba2TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=len(layers),
        layers=layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        time_step_limit=tuple(map(float, config.time_step_limit)),
        residual_in_fp32=False,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        **own,
    )


def from_family_names(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of a family under our names. Those of no known name keep it, and so do parts without the others."""
    family, found = FAMILIES[kind], {}
    parts: dict[tuple[str, int], dict[int, str]] = {}
    for name, value in tensors.items():
        new, place = _new_name(name, family)
        if place:
            parts.setdefault((new, place[1]), {})[place[0]] = name
        else:
            found[new] = value
    for (new, whole), own in parts.items():
        if len(own) == whole:
            found[new] = torch.cat([tensors[own[i]] for i in range(whole)])
        else:
            found |= {name: tensors[name] for name in own.values()}
    return found


def _new_name(name: str, family: Family) -> tuple[str, list[int]]:
    """Our name, and for a part of a tensor its place and the number of parts."""
    if name in _OUTER:
        return _OUTER[name], []
    if match := re.fullmatch(r"(?:model|backbone)\.layers\.(\d+)\.(.*)", name):
        for old, (block, new, *place) in family.names.items():
            if match[2].startswith(old):
                layer = int(match[1]) * family.blocks + block
                return f"backbone.layers.{layer}.{new}{match[2].removeprefix(old)}", place
    return name, []


def _theta(config) -> float:
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']!r}; rotary positions are 'default' here")
    return rope["rope_theta"]
