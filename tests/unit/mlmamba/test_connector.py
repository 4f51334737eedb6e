"""Connectors: every combination of name, scan and layout works, and each has the parameters that its paper implies.

Full sizes exist on the meta device only. That the released layout computes what the released code does is in
test_convert_released.py.
"""

import itertools
import typing

import pytest
import torch
from torch.nn import functional as F

from mlmamba.configuration import ConnectorConfig
from mlmamba.connector import CONNECTORS, build_connector, image_layout, tokens_per_image
from mlmamba.presets import preset
from mlmamba.scan2d import MERGES, SCANS
from tests.helpers.closeness import assert_close
from tests.helpers.tiny import NATIVE, tiny_config
from workflows.recipe.model import ConnectorRecipe

SMALL = {"head_dim": 8, "state_size": 4, "chunk_size": 4}
LAYOUTS = ("paper", "released")
MSC, VSS = ("msc_basic", "msc_advanced"), ("vss_mlp", "vss_l2")
KEEPS_ALL = [name for name in CONNECTORS if name != "ldpv2"]
WIDTH, OUT, STATE = 2176, 2560, 128


def build(width: int = 12, out: int = 16, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_connector(width, out, ConnectorConfig(**{**SMALL, **options}))


@pytest.mark.parametrize(("name", "scan", "layout"), list(itertools.product(CONNECTORS, SCANS, LAYOUTS)))
def test_every_connector_maps_the_grid_and_trains_every_parameter(name, scan, layout):
    connector = build(name=name, scan=scan, layout=layout)
    out = connector(torch.randn(2, 15, 12), (3, 5))
    assert out.shape == (2, connector.tokens((3, 5)), 16)
    out.square().sum().backward()
    idle = [n for n, p in connector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle


@pytest.mark.parametrize("name", KEEPS_ALL)
def test_only_ldpv2_changes_the_number_of_tokens(name):
    assert CONNECTORS[name].tokens((27, 27)) == 729


@pytest.mark.parametrize(
    ("grid", "out"), [((27, 27), (14, 14)), ((24, 24), (12, 12)), ((3, 5), (2, 3)), ((1, 1), (1, 1))]
)
def test_ldpv2_halves_the_grid(grid, out):
    """27 to 14 is Cobra's 196 tokens, 24 to 12 is MobileVLM v2's 144."""
    assert CONNECTORS["ldpv2"].grid_out(grid) == out
    assert build(name="ldpv2")(torch.randn(1, grid[0] * grid[1], 12), grid).shape == (1, out[0] * out[1], 16)


def test_tokens_per_image_of_a_model():
    assert tokens_per_image(preset("2.7b")) == 729
    assert tokens_per_image(preset("2.7b", connector={"name": "ldpv2"})) == 196
    assert tokens_per_image(tiny_config()) == 4
    assert tokens_per_image(tiny_config(connector_config={"name": "ldpv2"})) == 1
    with pytest.raises(ValueError, match="unknown connector 'qformer'"):
        tokens_per_image(tiny_config(connector_config={"name": "qformer"}))


def parameters(**options) -> dict[str, int]:
    with torch.device("meta"):
        connector = build_connector(WIDTH, OUT, ConnectorConfig(**options))
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in connector.named_children()}
    return {**parts, "total": sum(parts.values())}


def linear(width: int, out: int) -> int:
    return width * out + out


def mixer(width: int, directions: int = 2) -> int:
    """Parameters of a visual selective scan: projections, gated norm, and per direction convolution, A_log, D, dt."""
    inner = 2 * width
    heads, conv = inner // 64, inner + 2 * STATE
    return width * (inner + conv + heads) + inner * width + inner + directions * (5 * conv + 3 * heads)


def test_the_released_layout_has_the_released_weights():
    """Shapes from paper.md 1.4: 5.57M, 2 x 59.9M with the norms, 59.0M, together 184.4M."""
    d = 2560
    block = mixer(d) + 2 * d + 3 * linear(d, d)  # LayerNorm with bias, SwiGLU
    expected = {
        "mlp": linear(2176, d),
        "layers": 2 * block,
        "norm_f": 2 * d,
        "projector": linear(d, 4 * d) + linear(4 * d, d) + linear(d, d),
    }
    expected["total"] = sum(expected.values())
    assert parameters(layout="released") == expected
    assert expected["total"] == 184_405_440
    assert [round(n / 1e6, 1) for n in (mixer(d), block, 3 * linear(d, d), expected["projector"])] == [
        40.2,
        59.9,
        19.7,
        59.0,
    ]


@pytest.mark.parametrize("name", ["mlp", "fused_mlp"])
def test_the_plain_connector_has_cobras_weights(name):
    """Cobra: 2176 -> 8704 -> 2560 -> 2560, 47.8M."""
    total = linear(WIDTH, 8704) + linear(8704, OUT) + linear(OUT, OUT)
    assert parameters(name=name) == {"projector": total, "total": total}
    assert round(total / 1e6, 1) == 47.8


def test_vl_mambas_connectors_at_full_size():
    two_layers = linear(WIDTH, OUT) + linear(OUT, OUT)
    assert parameters(name="vl_mlp")["total"] == two_layers
    assert parameters(name="vss_mlp")["total"] == mixer(WIDTH) + 2 * WIDTH + two_layers
    assert parameters(name="vss_l2")["total"] == linear(WIDTH, OUT) + mixer(OUT) + 2 * OUT + linear(OUT, OUT)
    assert parameters(name="vss_l2", hidden_size=WIDTH)["total"] == (
        linear(WIDTH, WIDTH) + mixer(WIDTH) + 2 * WIDTH + linear(WIDTH, OUT)
    )


def test_ldpv2_at_full_size():
    peg = 9 * OUT + OUT
    assert parameters(name="ldpv2")["total"] == linear(WIDTH, 4 * WIDTH) + linear(4 * WIDTH, OUT) + peg
    mobile_vlm = linear(WIDTH, OUT) + linear(OUT, OUT) + peg
    assert parameters(name="ldpv2", hidden_size=OUT)["total"] == mobile_vlm


@pytest.mark.parametrize(("scan", "directions"), [("bsm", 2), ("csm", 4)])
def test_ml_mambas_connectors_at_full_size(scan, directions):
    basic = mixer(WIDTH, directions) + 2 * WIDTH + parameters(name="mlp")["total"]
    assert parameters(name="msc_basic", scan=scan)["total"] == basic
    swiglu_and_norm = 3 * linear(WIDTH, WIDTH) + 2 * WIDTH
    assert parameters(name="msc_advanced", scan=scan)["total"] == basic + swiglu_and_norm


@torch.no_grad()
def test_the_vss_connectors_follow_their_equations():
    """VL-Mamba 3.2: MLP(Norm(VSS(V) + V)), and Linear(Norm(VSS(GELU(V')) + V')) with V' = Linear(V)."""
    v = torch.randn(2, 6, 12)
    mlp = build(name="vss_mlp")
    h = F.layer_norm(mlp.mixer(v, (2, 3)) + v, (12,))
    first, second = mlp.projector[0], mlp.projector[2]
    torch.testing.assert_close(mlp(v, (2, 3)), second(F.gelu(first(h))))
    l2 = build(name="vss_l2")
    before = l2.linear_in(v)
    h = F.layer_norm(l2.mixer(F.gelu(before), (2, 3)) + before, (16,))
    torch.testing.assert_close(l2(v, (2, 3)), l2.linear_out(h))


@torch.no_grad()
def test_ldpv2_pools_and_adds_a_depthwise_convolution():
    connector, v = build(name="ldpv2"), torch.randn(1, 16, 12)
    maps = connector.projector(v).view(4, 4, 16)
    pooled = maps.view(2, 2, 2, 2, 16).mean((1, 3))
    weight, bias = connector.peg.weight[:, 0], connector.peg.bias
    for r, c in itertools.product(range(2), range(2)):
        seen = sum(pooled[i, j] * weight[:, i - r + 1, j - c + 1] for i in range(2) for j in range(2))
        torch.testing.assert_close(connector(v, (4, 4))[0, 2 * r + c], pooled[r, c] + seen + bias)


@pytest.mark.parametrize(("name", "scan"), list(itertools.product((*MSC, *VSS), SCANS)))
def test_a_scan_sees_where_a_patch_is(name, scan):
    connector, features = build(name=name, scan=scan), torch.randn(1, 6, 12)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved, kept = connector(features[:, order], (2, 3)), connector(features, (2, 3))[:, order]
    assert (moved - kept).abs().max() > 1e-3 * kept.abs().max()


@pytest.mark.parametrize("name", ["mlp", "vl_mlp", "fused_mlp"])
def test_the_plain_connectors_do_not(name):
    connector, features = build(name=name), torch.randn(1, 6, 12)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(connector(features[:, order], (2, 3)), connector(features, (2, 3))[:, order])


@pytest.mark.parametrize(("scan", "depends"), [("bsm", False), ("csm", True)])
def test_only_the_cross_scan_depends_on_the_shape_of_the_grid(scan, depends):
    connector, features = build(scan=scan), torch.randn(1, 6, 12)
    assert torch.equal(connector(features, (2, 3)), connector(features, (3, 2))) is not depends


@torch.no_grad()
def test_the_sum_is_the_mean_times_the_number_of_scans():
    mean, total = (build(name="vss_l2", scan="csm", merge=merge).mixer for merge in MERGES)
    x = torch.randn(1, 6, 16)
    torch.testing.assert_close(total(x, (2, 3)), 4 * mean(x, (2, 3)))


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "qformer"}, "unknown connector 'qformer'; choose one of mlp, msc_basic, msc_advanced"),
        ({"layout": "relased"}, "unknown connector layout 'relased'; choose one of paper, released"),
        ({"scan": "zigzag"}, "unknown scan 'zigzag'; choose one of bsm, csm"),
        ({"merge": "max"}, "unknown merge 'max'; choose one of mean, sum"),
        ({"head_dim": 16}, "scan width 2 x 12 = 24 is not a multiple of head_dim 16"),
    ],
)
def test_what_does_not_exist_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_recipes_know_every_connector_scan_merge_and_layout():
    fields = ConnectorRecipe.model_fields
    choices = {name: typing.get_args(fields[name].annotation) for name in ("name", "scan", "merge", "layout")}
    assert choices == {"name": tuple(CONNECTORS), "scan": SCANS, "merge": MERGES, "layout": LAYOUTS}


@pytest.mark.parametrize("name", [name for name in CONNECTORS if name != "vss_l2"])
def test_balanced_first_weights_keep_what_differs_between_images(name):
    """Shares of the energy, as measured on images whose features have a common part."""
    torch.manual_seed(0)
    common = torch.randn(16, 48)
    features = 0.8 * common + 0.6 * torch.randn(40, 16, 48)

    def share(x: torch.Tensor) -> float:
        return ((x - x.mean(0)).square().sum() / x.square().sum()).item()

    shares = []
    for balanced in (False, True):
        torch.manual_seed(1)
        connector = build_connector(48, 32, ConnectorConfig(name=name, head_dim=16, state_size=16, chunk_size=16))
        if balanced:
            connector.balance(0.1)
        with torch.no_grad():
            out = connector(features, (4, 4))
        shares.append(share(out))
    assert shares[1] > 1.2 * shares[0]
    if name != "ldpv2":  # it pools
        assert 0.05 < out.square().mean().sqrt() < 0.2


@pytest.mark.parametrize(("name", "scan"), list(itertools.product(CONNECTORS, SCANS)))
def test_images_in_one_row_do_not_see_each_other(name, scan):
    connector, grids = build(name=name, scan=scan), [(2, 4), (4, 2), (6, 2), (2, 2)]
    images = [torch.randn(1, height * width, 12, requires_grad=True) for height, width in grids]
    alone = [connector(x, grid) for x, grid in zip(images, grids, strict=True)]
    row = connector(torch.cat(images, 1), grids)
    assert_close(row, torch.cat(alone, 1), 1e-5)
    assert row.shape[1] == sum(connector.tokens(grid) for grid in grids)
    row[:, : alone[0].shape[1]].sum().backward()
    assert [x.grad.abs().sum() > 0 for x in images] == [True, False, False, False]


def test_a_connector_of_a_fixed_number_of_tokens_takes_no_images_at_their_own_size(monkeypatch):
    class Fixed(CONNECTORS["mlp"]):
        @classmethod
        def grid_out(cls, grid):
            return (8, 8)

    monkeypatch.setitem(CONNECTORS, "fixed", Fixed)
    config = tiny_config(vision_config=NATIVE, connector_config={**SMALL, "name": "fixed"})
    with pytest.raises(ValueError, match="connector 'fixed' does not make one token of 1 x 1 cells on any grid"):
        tokens_per_image(config)


def test_what_decides_the_tokens_of_an_image():
    assert tokens_per_image(tiny_config(vision_config=NATIVE)) == {
        "patch": 16,
        "merge": 1,
        "min_tokens": 2,
        "max_tokens": 12,
    }
    pooled = tiny_config(vision_config=NATIVE, connector_config={**SMALL, "name": "ldpv2"})
    assert image_layout(pooled).count(96, 64) == 6
    tiled = tiny_config(vision_config={**NATIVE, "image_size": 32, "tiles": 4, "min_tokens": 1, "max_tokens": None})
    assert tokens_per_image(tiled) == {"image_size": 32, "tokens": 4, "tiles": 4}
