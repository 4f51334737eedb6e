"""Kernels that take several steps of a block at once, against Mamba2Mixer on the torch path. Float32, within 1e-5."""

import torch

from mlmamba.mamba2 import Mamba2Mixer
from mlmamba.ops.cuda import load_scan
from mlmamba.state import LayerState
from tests.helpers.closeness import assert_close
from tests.helpers.tiny import tiny_config
from tests.interpreter.test_model import SIZES, TOLERANCE


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
