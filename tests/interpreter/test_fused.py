"""Kernels that take several steps of a block at once, against Mamba2Mixer on the torch path. Float32, within 1e-5."""

import pytest
import torch

from mlmamba import ops
from mlmamba.mamba2 import Mamba2Backbone, Mamba2Mixer
from mlmamba.ops import cuda
from tests.helpers.closeness import assert_close, gradients
from tests.helpers.tiny import HYBRID, tiny_config
from tests.interpreter.test_model import SIZES

TOLERANCE = 1e-5


def mixer(**changes) -> Mamba2Mixer:
    torch.manual_seed(0)
    return Mamba2Mixer(tiny_config(SIZES | changes).text_config)


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


def backbone(**changes) -> Mamba2Backbone:
    torch.manual_seed(0)
    return Mamba2Backbone(tiny_config(SIZES | changes).text_config)


def counted_norms(monkeypatch) -> list:
    load, called = cuda.load_norm(), []
    monkeypatch.setattr(cuda, "load_norm", lambda: lambda *a, **k: called.append(1) or load(*a, **k))
    return called


@pytest.mark.parametrize("changes", [{}, {"residual_in_fp32": False}, HYBRID])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_sum_and_norm_are_one_kernel_in_training_and_prompts(changes, precision, monkeypatch):
    """In bf16 as training has it: weights in float32 under autocast."""
    whole, x = backbone(**changes), torch.randn(2, 19, 32, requires_grad=True)
    called, found = counted_norms(monkeypatch), []
    for path in ("cuda", "torch"):
        with ops.force_path(path), torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
            y, _ = whole(x, keep_state=False)
        found.append((y, gradients((y,), {"x": x, **dict(whole.layers.named_parameters())})))
    assert len(called) == len(whole.layers)
    (ours, ours_g), (truth, truth_g) = found
    tolerance = TOLERANCE if precision == torch.float32 else 4e-2
    assert ours.dtype == truth.dtype == torch.float32
    assert_close(ours, truth, tolerance)
    for name, gradient in truth_g.items():
        assert_close(ours_g[name], gradient, tolerance, f"gradient of {name}", floor=1.0)


def test_bf16_weights_and_a_state_to_go_on_from(monkeypatch):
    whole, x = backbone().bfloat16(), torch.randn(2, 9, 32).bfloat16()
    called, found = counted_norms(monkeypatch), []
    for path in ("cuda", "torch"):
        with ops.force_path(path), torch.no_grad():
            _, state = whole(x[:, :4])
            found.append(whole(x[:, 4:], state)[0])
    assert len(called) == 2 * len(whole.layers)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert_close(*found, 4e-2)


def test_a_checkpoint_of_a_block_holds_one_tensor(monkeypatch):
    whole, x = backbone().train(), torch.randn(2, 9, 32, requires_grad=True)
    whole.gradient_checkpointing = True
    called = counted_norms(monkeypatch)
    with ops.force_path("cuda"):
        whole(x, keep_state=False)[0].sum().backward()
    assert called == []
