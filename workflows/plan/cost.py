"""What training costs: floating point operations, and bytes that a worker sends.

Operations count multiply and add apart.

Language model, per position and block: projections 2 d (2 e + 2 g n + h) + 2 e d, convolution 2 w (e + 2 g n), and the
scan in its chunked form (Dao and Gu 2024, arXiv 2405.21060, section 6: within chunks 2 q (g n + e), states in and out
4 e n). Position-wise that is the 2 N per token of the usual estimate (Kaplan et al. 2020, arXiv 2001.08361, section
2.1) and the scan beside it. The head counts at positions with loss only. Encoder and connector are counted by torch's
FlopCounterMode on tensors without data, per image.

The backward pass costs a part as much again for the gradients of its weights when it trains, and as much again for the
gradients of its inputs when it or something before it trains. So a frozen language model behind a training connector
costs 4 N, all trained 6 N, a frozen encoder its forward pass. Activation checkpointing runs the language blocks forward
once more; that is no progress, and so it is kept apart (hardware against model operations).

Bytes that one worker sends in an optimizer step, by ZeRO stage.

With N workers, A micro batches, T parameters that train, each of t bytes on the way (2 for the weights of linear layers
and convolutions in bf16, else 4), and f = (N - 1) / N, the share that every ring collective moves of what it gathers or
reduces (Rajbhandari et al. 2020, arXiv 1910.02054, section 7):

              gathered                                          reduced
    ZeRO 0    f 4 T, the other half of the all-reduce           f 4 T, once a step
    ZeRO 1    f 4 T, the new weights, once a step               f t T, once a step
    ZeRO 2    f 4 T, the new weights, once a step               f t T, in every micro batch
    ZeRO 3    f t of all weights in the forward pass and of     f t T, in every micro batch
              those that gradients pass through in the
              backward pass, in every micro batch

As DeepSpeed 0.19 does it (runtime/zero/stage_1_and_2.py, stage3.py, torch_autocast.py). Under ZeRO 3 it is an upper
bound: small weights are not sharded, and those that the forward pass used last may still be there in the backward pass.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn
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


def image_shape(model, tokens: int) -> tuple[tuple[int, int], float]:
    """What an image of so many tokens is to the encoder and the connector: the grid of its features, and how many of
    such there are: squares of a tiled image."""
    layout = model.image_layout
    if not layout.patch:
        return model.vision.grid, tokens / layout.tokens
    rows = max(1, round(math.sqrt(tokens)))
    return (rows * layout.pool, max(1, round(tokens / rows)) * layout.pool), 1.0


def forward_flops(model, tokens: int | None = None) -> Forward:
    """Count a model on the meta device. The connector's scan asks for autocast, which that has not: it is faked.

    Args:
        tokens: of an image, in the mean; the most unless it is given.
    """
    config, vision = model.config, model.vision.eval()
    (height, width), squares = image_shape(model, tokens or model.image_layout.most)
    sides = (
        [side * vision.merge * vision.patch for side in (height, width)] if vision.patch else [vision.image_size] * 2
    )
    image = torch.zeros(1, 3, *sides, device="meta")
    with torch.no_grad(), ops.force_path("torch"):  # whatever path this process is told to take
        seen = sum(_count(tower.encode, image)[0] for tower in vision.towers)
        with FakeTensorMode():
            build = build_connector(vision.channels, config.text_config.hidden_size, config.connector_config)
            passed, _ = _count(build, torch.zeros(1, height * width, vision.channels), (height, width))
    text = model.config.text_config
    head = 2 * text.hidden_size * text.vocab_size
    language = sum(kind_flops(text, kind, config.max_position_embeddings) for kind in text.kinds)
    return Forward(round(seen * squares), round(passed * squares), language, head)


def kind_flops(text, kind: str, length: int) -> float:
    """Operations of one block of a kind per position of a packed row, whose masked products are computed too."""
    d, queries = text.hidden_size, text.attention_head_dim * text.num_attention_heads
    if kind == "mamba2":
        return block_flops(text)
    if kind == "mlp":
        return 2 * d * text.mlp_size * (3 if text.mlp_activation == "swiglu" else 2)
    keys = text.attention_head_dim * text.num_key_value_heads
    attention = 2 * d * (2 * queries + 2 * keys) + 4 * length * queries
    return attention + (block_flops(text) if kind == "both" else 0)


def block_flops(text) -> float:
    """Operations of one Mamba-2 block per position."""
    d, h, n, g, q = text.hidden_size, text.num_heads, text.state_size, text.n_groups, text.chunk_size
    e = h * text.head_dim
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


HALVED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose parameters travel as bf16: BF16_MODULES of workflows/train/optim.py."""


@dataclass(frozen=True)
class Sent:
    """Bytes that one worker sends in an optimizer step."""

    zero_stage: int
    gathered: int
    reduced: int

    @property
    def total(self) -> int:
        return self.gathered + self.reduced

    def as_dict(self) -> dict:
        return {**asdict(self), "total": self.total}


def halved(module: nn.Module) -> int:
    """How many parameters of a module travel as bf16 when that is the compute type; shared ones count once."""
    found = {}
    for layer in module.modules():
        if isinstance(layer, HALVED):
            found |= {id(p): p.numel() for p in layer.parameters(recurse=False)}
    return sum(found.values())


def sent(
    zero_stage: int, workers: int, micro_batches: int, trained: int, on_the_way: int, forward: int, backward: int
) -> Sent:
    """What one worker sends in a step.

    Args:
        micro_batches: of one worker and step.
        trained: parameters that train.
        on_the_way: bytes of those when gradients travel.
        forward, backward: bytes of the weights that a forward pass needs, and of those that gradients pass through,
            when they are gathered.
    """

    def share(size: int) -> int:
        return size * (workers - 1) // workers

    if zero_stage == 0:
        return Sent(0, share(4 * trained), share(4 * trained))
    if zero_stage < 3:
        return Sent(zero_stage, share(4 * trained), share(on_the_way) * (micro_batches if zero_stage == 2 else 1))
    return Sent(3, micro_batches * share(forward + backward), micro_batches * share(on_the_way))
