"""Scan and convolution through mlmamba/ops/cuda.py, forward, final state and gradients, against the recurrence.

Float32 is held to 1e-5. In bf16 the scan of mamba_ssm rounds at other places than the recurrence does: 4e-2, the limit
that tests/parity/test_cuda_kernels.py has on a GPU.
"""

import itertools

import pytest
import torch

from mlmamba import ops
from mlmamba.ops import naive
from tests.helpers.closeness import assert_close, assert_same_gradients
from tests.helpers.ops_inputs import conv_inputs, ssd_inputs

CHUNK = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
SCANS = [
    (CHUNK + 2, 1, True, True, torch.float32),
    (CHUNK + 2, 2, True, False, torch.float32),
    (1, 1, False, False, torch.float32),
    (2 * CHUNK, 1, False, True, torch.float32),
    (CHUNK + 2, 1, True, True, torch.bfloat16),
]
CONVOLUTIONS = list(itertools.product((1, 3, 65), (False, True), (False, True), (torch.float32, torch.bfloat16)))


@pytest.mark.parametrize(("length", "groups", "with_state", "packed", "dtype"), SCANS)
def test_scan(length, groups, with_state, packed, dtype):
    a = ssd_inputs(length, groups, with_state, packed, dtype, head_dim=16, state=16)
    if packed:  # ids of a packed row need not begin at 0: padding can come first
        a["seq_idx"] = a["seq_idx"] + 3
    with ops.force_path("cuda"):
        ours = ops.ssd(**a, chunk_size=CHUNK)
    truth = naive.ssd(**a)
    assert (ours[0].dtype, ours[1].dtype) == (dtype, torch.float32)
    assert_close(ours[0], truth[0], TOLERANCE[dtype], "outputs")
    assert_close(ours[1], truth[1], TOLERANCE[dtype], "final state")
    assert_same_gradients(ours, truth, a, TOLERANCE[dtype])


@pytest.mark.parametrize(("length", "with_state", "packed", "dtype"), CONVOLUTIONS)
def test_convolution(length, with_state, packed, dtype):
    a = conv_inputs(length, with_state, packed, dtype, channels=64)
    with ops.force_path("cuda"):
        ours = ops.causal_conv1d(**a)
    truth = naive.causal_conv1d(**a)
    assert {t.dtype for t in ours} == {dtype}
    assert_close(ours[0], truth[0], TOLERANCE[dtype], "outputs")
    assert torch.equal(ours[1], truth[1])
    assert_same_gradients(ours, truth, a, TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 5])
def test_a_convolution_of_what_is_sliced_from_a_projection(rows, length):
    """Its strides and its first byte are those of the projection, which the kernel need not take."""
    whole = torch.randn(rows, length, 165)
    for first in (64, 63):
        x = whole[..., first : first + 96]
        weight, bias = torch.randn(96, 4), torch.randn(96)
        with ops.force_path("cuda"):
            y, tail = ops.causal_conv1d(x, weight, bias)
        truth_y, truth_tail = naive.causal_conv1d(x, weight, bias)
        assert_close(y, truth_y, TOLERANCE[torch.float32])
        assert torch.equal(tail, truth_tail)
