"""Checkpoints as others write them, built from the shapes of their layouts: state-spaces' and the ML-Mamba release's.

`make(*shape)` makes each tensor, so that the same description gives random tensors and full sizes on the meta device.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Make = Callable[..., Tensor]
STATE_SPACES = {  # config.json of state-spaces/mamba2-*, small
    "d_model": 16,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 250,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 4},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def random(dtype: torch.dtype = torch.float32) -> Make:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: (torch.randn(*shape, generator=generator) * 0.3).to(dtype)


def mixer(make: Make, d: int, state: int, head: int, directions: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """A Mamba2 module of mamba_ssm; with ("", "_b") the two-directional one of the ML-Mamba fork."""
    inner = 2 * d
    heads, conv = inner // head, inner + 2 * state
    tensors = {"in_proj.weight": make(inner + conv + heads, d), "norm.weight": make(inner)}
    for suffix in directions:
        tensors |= {
            f"conv1d{suffix}.weight": make(conv, 1, 4),
            f"conv1d{suffix}.bias": make(conv),
            **{f"{name}{suffix}": make(heads) for name in ("dt_bias", "A_log", "D")},
        }
    return {**tensors, "out_proj.weight": make(d, inner)}


def language(make: Make, d: int, blocks: int, rows: int, state: int, head: int) -> dict[str, Tensor]:
    """The state dict of mamba_ssm's MambaLMHeadModel, with its tied head."""
    tensors = {"backbone.embedding.weight": make(rows, d)}
    for i in range(blocks):
        tensors |= {f"backbone.layers.{i}.mixer.{name}": t for name, t in mixer(make, d, state, head).items()}
        tensors[f"backbone.layers.{i}.norm.weight"] = make(d)
    tensors["backbone.norm_f.weight"] = make(d)
    return {**tensors, "lm_head.weight": tensors["backbone.embedding.weight"]}


def write_state_spaces(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> dict[str, Tensor]:
    """config.json and pytorch_model.bin; returns the tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(STATE_SPACES | changes))
    tensors = language(random(dtype), 16, 2, 256, 8, 8)
    torch.save(tensors, folder / "pytorch_model.bin")
    return tensors


def linear(make: Make, name: str, width: int, out: int) -> dict[str, Tensor]:
    return {f"{name}.weight": make(out, width), f"{name}.bias": make(out)}


def released(
    make: Make, channels: int, d: int, blocks: int, rows: int, state: int, head: int
) -> dict[str, dict[str, Tensor]]:
    """The entry "model" of a released ML-Mamba checkpoint (paper.md 1.4, 2.3 and 8.1)."""
    scan = {}
    for i in range(2):
        at = f"layers.{i}."
        scan |= {f"{at}mixer.{name}": t for name, t in mixer(make, d, state, head, ("", "_b")).items()}
        for name in ("w1", "w2", "w3"):
            scan |= linear(make, f"{at}mlp.{name}", d, d)
        scan |= {f"{at}norm.weight": make(d), f"{at}norm.bias": make(d)}
    scan |= {"norm_f.weight": make(d), "norm_f.bias": make(d)}
    return {
        "llm_backbone": language(make, d, blocks, rows, state, head),
        "mlp": linear(make, "0", channels, d),
        "bidirectional_mamba": scan,
        "projector": {
            **linear(make, "projector.0", d, 4 * d),
            **linear(make, "projector.2", 4 * d, d),
            **linear(make, "projector.4", d, d),
        },
    }
