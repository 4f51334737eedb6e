"""Floating point operations of training, multiply and add counted apart.

Language model, per position and block: projections 2 d (2 e + 2 g n + h) + 2 e d, convolution 2 w (e + 2 g n), and the
scan in its chunked form (Dao and Gu 2024, arXiv 2405.21060, section 6: within chunks 2 q (g n + e), states in and out
4 e n). Position-wise that is the 2 N per token of the usual estimate (Kaplan et al. 2020, arXiv 2001.08361, section
2.1) and the scan beside it. The head counts at positions with loss only. Encoder and connector are counted by torch's
FlopCounterMode on tensors without data, per image.

The backward pass costs a part as much again for the gradients of its weights when it trains, and as much again for the
gradients of its inputs when it or something before it trains. So a frozen language model behind a training connector
costs 4 N, all trained 6 N, a frozen encoder its forward pass. Activation checkpointing runs the language blocks forward
once more; that is no progress, and so it is kept apart (hardware against model operations).
"""

from dataclasses import asdict, dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mlmamba import ops
from mlmamba.connector import build_connector

_BEFORE = {"vision": (), "connector": ("vision",), "language_model": ("vision", "connector")}


@dataclass(frozen=True)
class Forward:
    """Operations of one forward pass, by part."""

    vision_per_image: int
    connector_per_image: int
    language_per_token: float
    head_per_loss_token: int

    def as_dict(self) -> dict:
        return asdict(self)


def forward_flops(model) -> Forward:
    """Count a model on the meta device. The connector's scan asks for autocast, which that has not: it is faked."""
    size, config = model.config.vision_config.image_size, model.config
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta")
    with torch.no_grad(), ops.force_path("torch"):  # whatever path this process is told to take
        vision, features = _count(model.vision.eval(), image)
        with FakeTensorMode():
            build = build_connector(features.shape[-1], config.text_config.hidden_size, config.connector_config)
            connector, _ = _count(build, torch.zeros(features.shape), model.vision.grid)
    text = model.config.text_config
    head = 2 * text.hidden_size * text.vocab_size
    return Forward(vision, connector, text.num_hidden_layers * block_flops(text), head)


def block_flops(text) -> float:
    """Operations of one Mamba-2 block per position."""
    d, h, n, g, q = text.hidden_size, text.num_heads, text.state_size, text.n_groups, text.chunk_size
    e = text.expand * d
    conv = e + 2 * g * n
    projections = 2 * d * (e + conv + h) + 2 * e * d
    return projections + 2 * text.conv_kernel * conv + 2 * q * (g * n + e) + 4 * e * n


def training_flops(
    forward: Forward, trains: list[str], tokens: int, loss_tokens: int, images: int, recompute: bool
) -> tuple[float, float]:
    """Operations of training on so much, once: of the model, and of the hardware with recomputation.

    Args:
        trains: parts that train.
        tokens: positions, padding included.
        loss_tokens: those with a label.
        images: images.
        recompute: activation checkpointing.
    """
    language = tokens * forward.language_per_token
    parts = {
        "vision": images * forward.vision_per_image,
        "connector": images * forward.connector_per_image,
        "language_model": language + loss_tokens * forward.head_per_loss_token,
    }
    model = sum(count * _passes(part, trains) for part, count in parts.items())
    return model, model + (language if recompute else 0.0)


def _passes(part: str, trains: list[str]) -> int:
    """How often a part's forward cost is paid: forward, gradients of its inputs, gradients of its weights."""
    upstream = any(before in trains for before in _BEFORE[part])
    return 1 + (part in trains or upstream) + (part in trains)


def _count(module: torch.nn.Module, *inputs) -> tuple[int, torch.Tensor]:
    with FlopCounterMode(display=False) as counter:
        out = module(*inputs)
    return counter.get_total_flops(), out
