"""The mamba_ssm and causal_conv1d kernels against the recurrence: what tests/unit/mlmamba/test_ops.py asks of the
torch path.

Needs a GPU with both packages. Sizes are larger than in the unit tests, because the kernels are built for head sizes
and states in powers of two from 16 on.
"""

import itertools

import pytest
import torch

from mlmamba import ops
from mlmamba.ops import naive
from tests.helpers.closeness import assert_close, assert_same_gradients
from tests.helpers.ops_inputs import conv_inputs, ssd_inputs
from tests.helpers.tiny import pad, prompt, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and ops.has_kernels()), reason="needs CUDA and mamba-ssm"),
]

CHUNK = 64
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2)
CASES = list(itertools.product(LENGTHS, (False, True), (False, True), (torch.float32, torch.bfloat16)))
NAMES = ("length", "with_state", "packed", "dtype")
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 4e-2}  # Triton multiplies float32 as TF32


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(NAMES, CASES)
def test_recurrence(length, with_state, packed, dtype, groups):
    a = ssd_inputs(length, groups, with_state, packed, dtype, "cuda", head_dim=32, state=32)
    with ops.force_path("cuda"):
        ours = ops.ssd(**a, chunk_size=CHUNK)
    truth = naive.ssd(**a)
    assert (ours[0].dtype, ours[1].dtype) == (dtype, torch.float32)
    assert_close(ours[0], truth[0], TOLERANCE[dtype], "outputs")
    assert_close(ours[1], truth[1], TOLERANCE[dtype], "final state")
    assert_same_gradients(ours, truth, a, TOLERANCE[dtype])


@pytest.mark.parametrize(NAMES, CASES)
def test_convolution(length, with_state, packed, dtype):
    a = conv_inputs(length, with_state, packed, dtype, "cuda", channels=64)
    with ops.force_path("cuda"):
        ours = ops.causal_conv1d(**a)
    truth = naive.causal_conv1d(**a)
    assert_close(ours[0], truth[0], TOLERANCE[dtype], "outputs")
    assert torch.equal(ours[1], truth[1])
    assert_same_gradients(ours, truth, a, TOLERANCE[dtype])


@pytest.mark.parametrize(NAMES, CASES)
def test_our_own_convolution(length, with_state, packed, dtype):
    from mlmamba.ops.triton_convolution import causal_conv1d

    a = conv_inputs(length, with_state, packed, dtype, "cuda", channels=133)
    ours, truth = causal_conv1d(**a), naive.causal_conv1d(**a)
    assert_close(ours[0], truth[0], TOLERANCE[dtype], "outputs")
    assert torch.equal(ours[1], truth[1])
    assert_same_gradients(ours, truth, a, TOLERANCE[dtype])


def test_the_kernels_are_chosen_on_a_gpu():
    assert ops.path_for(torch.zeros(1, device="cuda")) == "cuda"
    assert ops.path_for(torch.zeros(1)) == "torch"


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_through_the_whole_model(side):
    sizes = {"state_size": 16, "head_dim": 16, "num_heads": 4, "hidden_size": 32, "chunk_size": 64}
    connector = {"head_dim": 16, "state_size": 16, "chunk_size": 64, "hidden_size": 16}
    model = tiny_model(sizes, connector_config=connector).cuda()
    ids, mask = (t.cuda() for t in pad([prompt(70, seed=1), prompt(9, seed=2)], side))
    results = []
    for path in ("torch", "cuda"):
        with ops.force_path(path):
            results.append(model(ids, attention_mask=mask))
    truth, ours = results
    assert_close(ours.logits[mask.bool()], truth.logits[mask.bool()], TOLERANCE[torch.float32])
    for a, b in zip(ours.cache_params.layers, truth.cache_params.layers, strict=True):
        assert_close(a.ssm, b.ssm, TOLERANCE[torch.float32])
