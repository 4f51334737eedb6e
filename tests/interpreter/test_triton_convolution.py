"""Our own Triton convolution, forward, last inputs and gradients, against the recurrence; and when it is chosen."""

import itertools

import pytest
import torch

from mlmamba import ops
from mlmamba.ops import cuda, naive, triton_convolution
from tests.helpers.closeness import assert_close, assert_same_gradients
from tests.helpers.ops_inputs import conv_inputs

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CASES = list(itertools.product((1, 3, 65), (False, True), (False, True), (torch.float32, torch.bfloat16)))


def compare(ours, truth, a, dtype):
    assert {t.dtype for t in ours} == {dtype}
    assert_close(ours[0], truth[0], TOLERANCE[dtype], "outputs")
    assert torch.equal(ours[1], truth[1])
    assert_same_gradients(ours, truth, a, TOLERANCE[dtype])


@pytest.mark.parametrize(("length", "with_state", "packed", "dtype"), CASES)
def test_it_equals_the_recurrence(length, with_state, packed, dtype):
    a = conv_inputs(length, with_state, packed, dtype, channels=133)
    compare(triton_convolution.causal_conv1d(**a), naive.causal_conv1d(**a), a, dtype)


@pytest.mark.parametrize("taps", [2, 3])
def test_fewer_taps(taps):
    a = conv_inputs(9, True, True)
    a["weight"] = torch.randn(6, taps, requires_grad=True)
    a["initial_state"] = torch.randn(2, taps - 1, 6, requires_grad=True)
    compare(triton_convolution.causal_conv1d(**a), naive.causal_conv1d(**a), a, torch.float32)


def test_without_a_bias_and_from_a_slice():
    x, weight = torch.randn(2, 7, 40)[..., 5:30], torch.randn(25, 4)
    ours, truth = triton_convolution.causal_conv1d(x, weight), naive.causal_conv1d(x, weight)
    assert_close(ours[0], truth[0], 1e-5)
    assert torch.equal(ours[1], truth[1])


def test_more_taps_are_refused():
    with pytest.raises(ValueError, match="the kernels take 4 taps at most, the convolution has 5"):
        triton_convolution.causal_conv1d(torch.randn(1, 2, 8), torch.randn(8, 5))


@pytest.fixture
def called(monkeypatch):
    """Which kernels `mlmamba.ops.cuda` took, in order."""
    names = []

    def counted(name, function):
        return lambda *args, **kwargs: names.append(name) or function(*args, **kwargs)

    for name, loader in (("package", "load_convolution"), ("own", "load_triton_convolution")):
        function = getattr(cuda, loader)()
        monkeypatch.setattr(cuda, loader, lambda name=name, function=function: counted(name, function))
    return names


@pytest.mark.parametrize(
    ("channels", "with_state", "packed", "expected"),
    [(64, False, True, "package"), (64, True, False, "package"), (64, True, True, "own"), (6, False, False, "own")],
)
def test_what_causal_conv1d_does_not_take_goes_to_ours(called, channels, with_state, packed, expected):
    a = conv_inputs(9, with_state, packed, channels=channels)
    with ops.force_path("cuda"):
        ours = ops.causal_conv1d(**a)
    assert called == [expected]
    compare(ours, naive.causal_conv1d(**a), a, torch.float32)


def test_without_causal_conv1d_ours_takes_all(called, monkeypatch):
    monkeypatch.setattr(cuda, "loads", lambda name: "" if name != "causal_conv1d" else "ImportError: no extension")
    ops.kernel_problem.cache_clear()
    try:
        assert ops.kernel("causal_conv1d") == "triton_convolution"
        assert ops.kernel_problem("causal_conv1d") == "causal_conv1d does not import: ImportError: no extension"
        a = conv_inputs(9, False, True, channels=64)
        with ops.force_path("cuda"):
            ours = ops.causal_conv1d(**a)
        assert called == ["own"]
        compare(ours, naive.causal_conv1d(**a), a, torch.float32)
    finally:
        ops.kernel_problem.cache_clear()
