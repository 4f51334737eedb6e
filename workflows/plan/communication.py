"""Bytes that one worker sends in an optimizer step, by ZeRO stage.

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

from dataclasses import asdict, dataclass

from torch import nn

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
