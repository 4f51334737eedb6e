"""Operators: the chunked path against the recurrence it must equal, over everything a caller can pass.

The recurrence in naive.py is the truth for all paths, so it is first held against the written-out sum. Then every
combination of length, groups, start state, boundaries and dtype, forward, final state and all gradients. The CUDA
kernels stand the same test in tests/parity/test_cuda_kernels.py.
"""

import itertools
import sys
from importlib import import_module

import pytest
import torch

from mlmamba import ops
from mlmamba.ops import chunked, convolution, naive
from tests.helpers.closeness import assert_close, assert_same_gradients
from tests.helpers.ops_inputs import BOUNDARIES, TOLERANCE, conv_inputs, ssd_inputs

CHUNK = 4
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2)
CASES = list(itertools.product(LENGTHS, (False, True), (False, True), (torch.float32, torch.bfloat16)))
NAMES = ("length", "with_state", "packed", "dtype")


def test_the_recurrence_is_the_written_out_sum():
    a = ssd_inputs(6, groups=2, with_state=True)
    y, state = naive.ssd(**a)
    B, C = (a[name].repeat_interleave(2, dim=2) for name in "BC")
    log_decay = (a["dt"] * a["A"]).cumsum(1)
    for t in range(6):
        held = torch.exp(log_decay[:, t])[..., None, None] * a["initial_state"]
        for s in range(t + 1):
            decay = torch.exp(log_decay[:, t] - log_decay[:, s])[..., None, None]
            held = held + decay * (a["dt"][:, s, :, None] * a["x"][:, s])[..., None] * B[:, s, :, None]
        expected = (held * C[:, t, :, None]).sum(-1) + a["D"][:, None] * a["x"][:, t]
        assert_close(y[:, t], expected, 1e-5)
    assert_close(state, held, 1e-5)


def test_the_convolution_is_torchs():
    a = conv_inputs(9, with_state=False)
    y, tail = naive.causal_conv1d(**a)
    padded = torch.nn.functional.pad(a["x"].transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(padded, a["weight"][:, None], a["bias"], groups=len(a["bias"]))
    assert_close(y, torch.nn.functional.silu(expected).transpose(1, 2), 1e-6)
    assert torch.equal(tail, a["x"][:, -3:])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(NAMES, CASES)
def test_chunked_recurrence_equals_naive(length, with_state, packed, dtype, groups):
    a = ssd_inputs(length, groups, with_state, packed, dtype)
    ours, truth = chunked.ssd(**a, chunk_size=CHUNK), naive.ssd(**a)
    assert (ours[0].dtype, ours[1].dtype) == (truth[0].dtype, truth[1].dtype) == (dtype, torch.float32)
    assert_close(ours[0], truth[0], TOLERANCE[dtype], "outputs")
    assert_close(ours[1], truth[1], TOLERANCE[dtype], "final state")
    assert_same_gradients(ours, truth, a, TOLERANCE[dtype])


@pytest.mark.parametrize(NAMES, CASES)
def test_shifted_convolution_equals_naive(length, with_state, packed, dtype):
    a = conv_inputs(length, with_state, packed, dtype)
    ours, truth = convolution.causal_conv1d(**a), naive.causal_conv1d(**a)
    assert {t.dtype for t in (*ours, *truth)} == {dtype}
    assert_close(ours[0], truth[0], TOLERANCE[dtype], "outputs")
    assert torch.equal(ours[1], truth[1])
    assert_same_gradients(ours, truth, a, TOLERANCE[dtype])


@pytest.mark.parametrize("path", ["naive", "torch"])
def test_a_packed_row_equals_its_sequences_alone(path):
    length = sum(BOUNDARIES)
    a, conv = ssd_inputs(length, packed=True), conv_inputs(length, packed=True)
    a["seq_idx"] = conv["seq_idx"] = a["seq_idx"][:1].expand(2, -1)
    with ops.force_path(path):
        y, state = ops.ssd(**a, chunk_size=CHUNK)
        out, tail = ops.causal_conv1d(**conv)
        start = 0
        for part in BOUNDARIES:
            here = slice(start, start + part)
            alone = {k: v[:, here] if k in ("x", "dt", "B", "C") else v for k, v in a.items() if k != "seq_idx"}
            own_y, own_state = ops.ssd(**alone, chunk_size=CHUNK)
            own_out, own_tail = ops.causal_conv1d(conv["x"][:, here], conv["weight"], conv["bias"])
            assert_close(y[:, here], own_y, 1e-5)
            assert_close(out[:, here], own_out, 1e-5)
            start += part
    assert_close(state, own_state, 1e-5)
    assert torch.equal(tail, own_tail)


def test_the_chunk_size_changes_rounding_only():
    a = ssd_inputs(13, groups=2, with_state=True, packed=True)
    truth = naive.ssd(**a)
    for size in (1, 2, 5, 13, 64):
        for ours, expected in zip(chunked.ssd(**a, chunk_size=size), truth, strict=True):
            assert_close(ours, expected, 1e-5, f"chunk size {size}")


def test_decay_to_nothing_gives_no_nan():
    a = ssd_inputs(3 * CHUNK, with_state=True)
    a["dt"] = (a["dt"].detach() * 30).requires_grad_()
    ours, truth = chunked.ssd(**a, chunk_size=CHUNK), naive.ssd(**a)
    assert_close(ours[0], truth[0], 1e-4)
    assert_same_gradients(ours, truth, a, 1e-4)


def test_gradients_in_double_precision():
    a = ssd_inputs(5, groups=2, with_state=True, packed=True, dtype=torch.float64)
    conv = conv_inputs(5, with_state=True, packed=True, dtype=torch.float64)
    seq_idx, order = a.pop("seq_idx"), list(a)
    assert torch.autograd.gradcheck(
        lambda *t: chunked.ssd(**dict(zip(order, t, strict=True)), seq_idx=seq_idx, chunk_size=2), list(a.values())
    )
    seq_idx, names = conv.pop("seq_idx"), list(conv)
    assert torch.autograd.gradcheck(
        lambda *t: convolution.causal_conv1d(**dict(zip(names, t, strict=True)), seq_idx=seq_idx), list(conv.values())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_steps_equal_the_sequence(dtype):
    a, conv = ssd_inputs(5, groups=2, with_state=True, dtype=dtype), conv_inputs(5, with_state=True, dtype=dtype)
    truth_y, truth_state = naive.ssd(**a)
    truth_out, truth_tail = naive.causal_conv1d(**conv)
    state, tail = a["initial_state"], conv["initial_state"]
    for t in range(5):
        y, state = ops.ssd_step(a["x"][:, t], a["dt"][:, t], a["A"], a["B"][:, t], a["C"][:, t], a["D"], state)
        out, tail = ops.causal_conv1d_step(conv["x"][:, t], conv["weight"], conv["bias"], tail)
        assert y.dtype == out.dtype == dtype
        assert_close(y, truth_y[:, t], TOLERANCE[dtype])
        assert_close(out, truth_out[:, t], TOLERANCE[dtype])
    assert_close(state, truth_state, TOLERANCE[dtype])
    assert torch.equal(tail, truth_tail)


def test_a_step_in_place_is_the_same_with_large_states():
    """Rows with large states are taken one after the other; the slice stands for a slot of a larger pool."""
    a = {name: t if t is None else t.detach() for name, t in ssd_inputs(1, groups=2, with_state=True).items()}
    x, dt, B, C = (a[name][:, 0] for name in ("x", "dt", "B", "C"))
    expected, state = ops.ssd_step(x, dt, a["A"], B, C, a["D"], a["initial_state"])
    assert len(x) > 1
    for smallest in (0, chunked.ROW_BYTES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunked, "ROW_BYTES", smallest)
            pool = torch.cat([a["initial_state"]] * 2)
            y, own = ops.ssd_step(x, dt, a["A"], B, C, a["D"], pool[: len(x)], in_place=True)
        assert own.data_ptr() == pool.data_ptr()
        assert_close(y, expected, 1e-6)
        assert_close(pool[: len(x)], state, 1e-6)
        assert torch.equal(pool[len(x) :], a["initial_state"])


@pytest.mark.parametrize("path", ["naive", "torch"])
def test_a_step_size_of_zero_leaves_the_state_untouched(path):
    a = ssd_inputs(2 * CHUNK + 1, with_state=True)
    a["dt"] = torch.zeros_like(a["dt"])
    with ops.force_path(path):
        _, state = ops.ssd(**a, chunk_size=CHUNK)
    assert torch.equal(state, a["initial_state"])


def test_a_path_is_chosen_by_argument_then_environment_then_device(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.delenv("MLMAMBA_OPS", raising=False)
    assert ops.path_for(x) == "torch"
    monkeypatch.setenv("MLMAMBA_OPS", "naive")
    assert ops.path_for(x) == "naive"
    with ops.force_path("torch"):
        assert ops.path_for(x) == "torch"
        with ops.force_path("naive"):
            assert ops.path_for(x) == "naive"
        assert ops.path_for(x) == "torch"
    assert ops.path_for(x) == "naive"


def test_a_forced_path_ends_with_its_block_also_on_an_error(monkeypatch):
    monkeypatch.delenv("MLMAMBA_OPS", raising=False)
    with pytest.raises(ZeroDivisionError), ops.force_path("naive"):
        raise ZeroDivisionError
    assert ops.path_for(torch.zeros(1)) == "torch"


def test_the_forced_path_is_the_one_that_runs():
    a = ssd_inputs(6)
    with ops.force_path("naive"):
        assert torch.equal(ops.ssd(**a)[0], naive.ssd(**a)[0])
    with ops.force_path("torch"):
        assert torch.equal(ops.ssd(**a)[0], chunked.ssd(**a)[0])


def test_unknown_paths_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="unknown operator path 'triton'; choose one of naive, torch, cuda"):
        ops.force_path("triton").__enter__()
    monkeypatch.setenv("MLMAMBA_OPS", "fast")
    with pytest.raises(ValueError, match="unknown operator path 'fast'"):
        ops.path_for(torch.zeros(1))


def test_a_kernel_package_that_is_found_and_does_not_import_is_named_and_not_used(tmp_path, monkeypatch):
    """As a build for another torch is: the torch path then runs, and the reason is known."""
    package = tmp_path / "causal_conv1d"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('causal_conv1d_cuda.so: undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    loaders = import_module("mlmamba.ops.cuda")
    cached = (loaders.load_convolution, loaders.loads, ops.kernel_problem)
    for function in cached:
        function.cache_clear()
    try:
        problem = ops.kernel_problem("causal_conv1d")
        assert problem == "causal_conv1d does not import: ImportError: causal_conv1d_cuda.so: undefined symbol: _ZN3c10"
        assert ops.kernel("causal_conv1d") == "triton_convolution"
    finally:
        for function in cached:
            function.cache_clear()
