"""Bytes that a worker sends in a step, by hand; and which parameters travel as bf16."""

import pytest
from torch import nn

from tests.helpers.tiny import tiny_model
from workflows.plan.cost import HALVED, halved, sent
from workflows.train.optim import BF16_MODULES


@pytest.mark.parametrize(
    ("zero_stage", "gathered", "reduced"),
    [
        # 4 workers, 3 micro batches, 600 parameters train, 1,400 bytes on the way; weights of 2,000 and 1,600 bytes.
        (0, 4 * 600 * 3 // 4, 4 * 600 * 3 // 4),
        (1, 4 * 600 * 3 // 4, 1400 * 3 // 4),
        (2, 4 * 600 * 3 // 4, 3 * 1400 * 3 // 4),
        (3, 3 * (2000 + 1600) * 3 // 4, 3 * 1400 * 3 // 4),
    ],
)
def test_by_zero_stage(zero_stage, gathered, reduced):
    found = sent(zero_stage, 4, 3, 600, 1400, 2000, 1600)
    assert (found.gathered, found.reduced, found.total) == (gathered, reduced, gathered + reduced)


def test_a_worker_alone_sends_nothing():
    assert [sent(stage, 1, 3, 600, 1400, 2000, 1600).total for stage in range(4)] == [0] * 4


def test_what_travels_as_bf16_is_what_deepspeed_is_told():
    """It is told classes by name, ours among them."""
    named = {name.rpartition(".")[2] for name in BF16_MODULES}
    assert named == {layer.__name__ for layer in HALVED}
    model = tiny_model()
    by_hand = {id(p): p.numel() for m in model.modules() if type(m).__name__ in named for p in m.parameters()}
    assert halved(model) == sum(by_hand.values())
    assert halved(nn.LayerNorm(4)) == 0
