"""The configuration of a Mamba-2 language model in the layout of state-spaces and in that of transformers.

The two agree on every tensor name but one (`backbone.embedding.weight` and `backbone.embeddings.weight`) and differ in
their config.json. Source: mamba_ssm's config_mamba.py, mixer_seq_simple.py and mamba2.py; paper.md 1.5 has the sizes.
"""

import math

from transformers import Mamba2Config

# ssm_cfg: mamba_ssm's argument, ours, and its default there.
_SSM = (
    ("d_state", "state_size", 128),
    ("d_conv", "conv_kernel", 4),
    ("expand", "expand", 2),
    ("headdim", "head_dim", 64),
    ("ngroups", "n_groups", 1),
    ("chunk_size", "chunk_size", 256),
    ("bias", "use_bias", False),
    ("conv_bias", "use_conv_bias", True),
    ("dt_limit", "time_step_limit", (0.0, math.inf)),
    ("dt_min", "time_step_min", 0.001),
    ("dt_max", "time_step_max", 0.1),
    ("dt_init_floor", "time_step_floor", 1e-4),
)
# Values that this model has built in; another one would be another architecture.
_FIXED_SSM = {"layer": "Mamba2", "rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": None}
_FIXED = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
_WITHOUT_EFFECT_SSM = {"A_init_range", "conv_init", "use_mem_eff_path"}  # initialisation and speed
_WITHOUT_EFFECT = {"attn_cfg", "fused_add_norm"}  # of attention layers, of which there are none; speed
_OTHERS = {"d_model", "n_layer", "vocab_size", "ssm_cfg", "residual_in_fp32", "pad_vocab_size_multiple"}
_OTHERS |= {"tie_embeddings", "architectures", "model_type", "dtype", "torch_dtype", "transformers_version"}
_EPSILON = 1e-5  # mamba_ssm has no field for it


def from_state_spaces(config: dict) -> Mamba2Config:
    """The transformers config of a state-spaces config.json. The vocabulary is the padded one, the embedding's rows.

    Raises:
        ValueError: the config has fields that are not known, or describes another architecture (Mamba-1, attention).
    """
    ssm = dict(config.get("ssm_cfg") or {})
    ssm.setdefault("layer", "Mamba1")
    _refuse_unknown(config.keys() - _OTHERS - _FIXED.keys() - _WITHOUT_EFFECT, "config.json")
    known = {theirs for theirs, _, _ in _SSM}
    _refuse_unknown(ssm.keys() - known - _FIXED_SSM.keys() - _WITHOUT_EFFECT_SSM, "config.json: ssm_cfg")
    for values, fixed in ((config, _FIXED), (ssm, _FIXED_SSM)):
        for name, value in fixed.items():
            if values.get(name, value) != value:
                raise ValueError(f"config.json: {name} is {values[name]!r}; this library's Mamba-2 has {value!r} only")
    fields = {ours: ssm.get(theirs, default) for theirs, ours, default in _SSM}
    fields["time_step_limit"] = tuple(map(float, fields["time_step_limit"]))
    width, multiple = config["d_model"], config.get("pad_vocab_size_multiple", 8)
    return Mamba2Config(
        hidden_size=width,
        num_hidden_layers=config["n_layer"],
        num_heads=width * fields["expand"] // fields["head_dim"],
        vocab_size=-(-config["vocab_size"] // multiple) * multiple,
        residual_in_fp32=config.get("residual_in_fp32", True),
        tie_word_embeddings=config.get("tie_embeddings", True),
        layer_norm_epsilon=_EPSILON,
        initializer_range=0.02,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        **fields,
    )


def to_state_spaces(config: Mamba2Config) -> dict:
    """The state-spaces config.json of a transformers config.

    Which rows of the embedding are padding is not known there, so the vocabulary is all of them.

    Raises:
        ValueError: state-spaces cannot express it.
    """
    check_supported(config)
    if config.layer_norm_epsilon != _EPSILON:
        raise ValueError(f"layer_norm_epsilon is {config.layer_norm_epsilon}; mamba_ssm has {_EPSILON} built in")
    values = [(theirs, getattr(config, ours), default) for theirs, ours, default in _SSM]
    differing = {
        theirs: list(value) if theirs == "dt_limit" else value
        for theirs, value, default in values
        if (tuple(value) if theirs == "dt_limit" else value) != default
    }
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": "Mamba2", **differing},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16 if config.vocab_size % 16 == 0 else 1,
        "tie_embeddings": config.tie_word_embeddings,
    }


def check_supported(config: Mamba2Config) -> None:
    """Raises ValueError for the one field of transformers' that our Mamba-2 does not follow."""
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act is {config.hidden_act!r}; this library's Mamba-2 has 'silu' only")


def _refuse_unknown(names: set[str], where: str) -> None:
    if names:
        raise ValueError(f"{where} has {len(names)} fields that are not known, first {sorted(names)[:3]}")
