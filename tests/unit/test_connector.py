"""Connectors: every combination of name, scan and layout works, and the released layout has the released weights."""

import itertools

import pytest
import torch

from mlmamba.configuration import ConnectorConfig
from mlmamba.connector import CONNECTORS, build_connector
from mlmamba.scan2d import SCANS

SMALL = {"head_dim": 8, "state_size": 4, "chunk_size": 4}
LAYOUTS = ("paper", "released")


def build(width: int = 12, out: int = 16, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_connector(width, out, ConnectorConfig(**{**SMALL, **options}))


@pytest.mark.parametrize(("name", "scan", "layout"), list(itertools.product(CONNECTORS, SCANS, LAYOUTS)))
def test_every_connector_maps_the_grid_and_trains_every_parameter(name, scan, layout):
    connector = build(name=name, scan=scan, layout=layout)
    out = connector(torch.randn(2, 6, 12), (2, 3))
    assert out.shape == (2, 6, 16)
    out.square().sum().backward()
    idle = [n for n, p in connector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle


def parameters(**options) -> dict[str, int]:
    with torch.device("meta"):
        connector = build_connector(2176, 2560, ConnectorConfig(**options))
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in connector.named_children()}
    return {**parts, "total": sum(parts.values())}


def test_the_released_layout_has_the_released_weights():
    """Shapes from paper.md 1.4: 5.57M, 2 x 59.9M with the norms, 59.0M, together 184.4M."""
    d, inner, state, heads = 2560, 5120, 128, 80
    conv = inner + 2 * state
    in_proj, out_proj = d * (inner + conv + heads), inner * d
    directions = 2 * (4 * conv + conv + 3 * heads)  # weight, bias; A_log, D, dt_bias
    mixer = in_proj + directions + inner + out_proj  # and the gated norm
    block = mixer + 2 * d + 3 * (d * d + d)  # LayerNorm with bias, SwiGLU
    expected = {
        "mlp": 2176 * d + d,
        "layers": 2 * block,
        "norm_f": 2 * d,
        "projector": (d * 4 * d + 4 * d) + (4 * d * d + d) + (d * d + d),
    }
    expected["total"] = sum(expected.values())
    assert parameters(layout="released") == expected
    assert expected["total"] == 184_405_440
    assert round(mixer / 1e6, 1) == 40.2


def test_the_plain_connector_has_cobras_weights():
    """Cobra: 2176 -> 8704 -> 2560 -> 2560, 47.8M."""
    assert round(parameters(name="mlp")["total"] / 1e6, 1) == 47.8


def test_the_advanced_connector_adds_swiglu_and_its_norm():
    added = parameters(name="msc_advanced")["total"] - parameters(name="msc_basic")["total"]
    assert added == 3 * (2176 * 2176 + 2176) + 2 * 2176


@pytest.mark.parametrize("scan", SCANS)
def test_a_scan_sees_where_a_patch_is(scan):
    connector, features = build(scan=scan), torch.randn(1, 6, 12)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved, kept = connector(features[:, order], (2, 3)), connector(features, (2, 3))[:, order]
    assert (moved - kept).abs().max() > 1e-3 * kept.abs().max()


def test_the_plain_connector_does_not():
    connector, features = build(name="mlp"), torch.randn(1, 6, 12)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(connector(features[:, order], (2, 3)), connector(features, (2, 3))[:, order])


@pytest.mark.parametrize(("scan", "depends"), [("bsm", False), ("csm", True)])
def test_only_the_cross_scan_depends_on_the_shape_of_the_grid(scan, depends):
    connector, features = build(scan=scan), torch.randn(1, 6, 12)
    assert torch.equal(connector(features, (2, 3)), connector(features, (3, 2))) is not depends


def test_the_first_patch_sees_the_last_one():
    connector, features = build(), torch.randn(1, 6, 12)
    changed = features.clone()
    changed[:, -1] += 1
    assert not torch.equal(connector(features, (2, 3))[:, 0], connector(changed, (2, 3))[:, 0])


@torch.no_grad()
def test_a_loud_direction_does_not_drown_the_other():
    """Each direction is normalised before the merge, as in the released code."""
    mixer, features = build(layout="released").layers[0].mixer, torch.randn(1, 6, 16)
    mixer.scans[1].D.mul_(1e4)
    out = mixer(features, (2, 3))
    mixer.scans[0].D.neg_()
    assert (mixer(features, (2, 3)) - out).abs().max() > 0.1 * out.abs().max()


def test_unknown_connectors_are_refused():
    with pytest.raises(ValueError, match="unknown connector 'qformer'; choose one of mlp, msc_basic, msc_advanced"):
        build(name="qformer")


def test_a_scan_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="scan width 2 x 12 = 24 is not a multiple of head_dim 16"):
        build(head_dim=16)
