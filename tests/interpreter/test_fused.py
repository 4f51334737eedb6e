"""Kernels that take several steps of a block at once, against Mamba2Mixer on the torch path. Float32, within 1e-5."""

import pytest
import torch

from mlmamba import ops
from mlmamba.mamba2 import Mamba2Mixer
from mlmamba.ops.cuda import load_scan
from mlmamba.state import LayerState
from tests.helpers.closeness import assert_close, gradients
from tests.helpers.tiny import tiny_config
from tests.interpreter.test_model import SIZES

TOLERANCE = 1e-5


def mixer(**changes) -> Mamba2Mixer:
    torch.manual_seed(0)
    return Mamba2Mixer(tiny_config(SIZES | changes).text_config)


@torch.no_grad()
def test_decoding_over_slots_of_a_pool():
    """A step of three sequences whose states lie anywhere in a pool of six, in four kernels besides the projections."""
    load_scan()  # which makes mamba_ssm importable
    from causal_conv1d import causal_conv1d_update
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    m = mixer()
    x, state = torch.randn(3, 1, 32), LayerState(torch.randn(3, 3, m.conv_dim), torch.randn(3, 4, 16, 16))
    expected, after = m(x, LayerState(state.conv.clone(), state.ssm.clone()))
    slots = torch.tensor([4, 0, 2], dtype=torch.int32)
    ssm, history = torch.randn(6, 4, 16, 16), torch.zeros(6, m.conv_dim, 4)
    others = ssm[[1, 3, 5]].clone()
    ssm[slots.long()], history[slots.long(), :, 1:] = state.ssm, state.conv.transpose(1, 2)

    z, xBC, dt = m.in_proj(x[:, 0]).split([m.inner, m.conv_dim, m.heads], -1)
    xBC = causal_conv1d_update(xBC, history, m.conv1d.weight[:, 0], m.conv1d.bias, "silu", conv_state_indices=slots)
    xs, B, C = m._split(xBC)
    p, n = xs.shape[-1], B.shape[-1]
    y = selective_state_update(
        ssm,
        xs,
        dt[..., None].expand(-1, -1, p),
        -torch.exp(m.A_log)[:, None, None].expand(-1, p, n),
        B,
        C,
        D=m.D[:, None].expand(-1, p),
        dt_bias=m.dt_bias[:, None].expand(-1, p),
        dt_softplus=True,
        state_batch_indices=slots,
    )
    y = rmsnorm_fn(y.flatten(1), m.norm.weight, None, z=z, eps=m.norm.eps, norm_before_gate=False)
    assert_close(m.out_proj(y), expected[:, 0], TOLERANCE, "outputs")
    assert_close(ssm[slots.long()], after.ssm, TOLERANCE, "states")
    assert_close(history[slots.long(), :, 1:].transpose(1, 2), after.conv, TOLERANCE, "inputs of the convolution")
    assert torch.equal(ssm[[1, 3, 5]], others)


def leaves(m: Mamba2Mixer, x: torch.Tensor) -> dict:
    return {"x": x, **dict(m.named_parameters())}


@pytest.mark.parametrize(
    ("packed", "keep_state", "changes"),
    [
        (False, True, {}),
        (True, True, {"n_groups": 2}),
        (True, False, {}),
        (False, True, {"time_step_limit": (0.02, 0.5), "use_conv_bias": False}),
    ],
)
def test_a_whole_mixer_in_one_function(packed, keep_state, changes, monkeypatch):
    m = mixer(**changes)
    x = torch.randn(2, 19, 32, requires_grad=True)
    seq_idx = torch.tensor([[0] * 5 + [1] * 14, [0] * 17 + [1] * 2]) if packed else None
    called = []
    one = ops.block
    monkeypatch.setattr(ops, "block", lambda *a, **k: called.append(1) or one(*a, **k))
    found = []
    for path in ("cuda", "torch"):
        with ops.force_path(path):
            y, state = m(x, seq_idx=seq_idx, keep_state=keep_state)
        out = (y, state.conv, state.ssm) if keep_state else (y,)
        assert state is not None or not keep_state
        found.append((out, gradients(out, leaves(m, x))))
    assert called == [1]
    (ours, ours_g), (truth, truth_g) = found
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, TOLERANCE)
    for name, gradient in truth_g.items():
        assert_close(ours_g[name], gradient, TOLERANCE, f"gradient of {name}", floor=1.0)


def test_in_bf16_it_is_within_the_limit_of_the_scan():
    m, x = mixer().bfloat16(), torch.randn(2, 19, 32).bfloat16().requires_grad_()
    found = []
    for path in ("cuda", "torch"):
        with ops.force_path(path):
            y, _ = m(x, keep_state=False)
        found.append((y, gradients((y,), leaves(m, x))))
    (ours, ours_g), (truth, truth_g) = found
    assert ours.dtype == truth.dtype == torch.bfloat16
    assert_close(ours, truth, 4e-2)
    for name, gradient in truth_g.items():
        assert ours_g[name].dtype == gradient.dtype
        assert_close(ours_g[name], gradient, 4e-2, f"gradient of {name}", floor=1.0)


def test_what_it_does_not_take_runs_in_steps():
    """A state to go on from, padding, a single token, channels that the convolution does not take."""
    m, x = mixer(), torch.randn(2, 9, 32)
    with ops.force_path("cuda"):
        assert ops.fuses(x, m.conv_dim, 4)
        assert not ops.fuses(x[:, :1], m.conv_dim, 4)
        assert not ops.fuses(x, 12, 4)
        assert not ops.fuses(x, m.conv_dim, 5)
    assert not ops.fuses(x, m.conv_dim, 4)
    with ops.force_path("cuda"), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        _, state = m(x)
        patch.setattr(ops, "block", None)
        y, _ = m(x, state)
        m(x, mask=torch.ones(2, 9, dtype=torch.bool))
    with ops.force_path("torch"), torch.no_grad():
        assert_close(y, m(x, m(x)[1])[0], TOLERANCE)
