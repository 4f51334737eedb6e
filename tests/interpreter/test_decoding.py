"""Decoding as a GPU does it: the kernels of a step over slots of a pool, and answers from buffers that stay.

What only a GPU shows: that the step is captured as CUDA graphs, and its speed.
"""

import pytest
import torch

from mlmamba import ops
from mlmamba.decoding import Decoder, prepare
from mlmamba.mamba2 import Mamba2Mixer
from mlmamba.ops import cuda
from mlmamba.ops.step import Between
from mlmamba.ops.triton_convolution import causal_conv1d_update
from mlmamba.state import LayerState
from tests.helpers.closeness import assert_close
from tests.helpers.launches import counted_launches
from tests.helpers.tiny import images, prompt, tiny_config, tiny_model
from tests.interpreter.test_model import CONNECTOR, SIZES

TOLERANCE = 1e-5


def mixer(**changes) -> Mamba2Mixer:
    torch.manual_seed(0)
    return Mamba2Mixer(tiny_config(SIZES | changes).text_config)


@torch.no_grad()
@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("changes", [{}, {"n_groups": 2, "use_conv_bias": False, "conv_kernel": 3}])
@pytest.mark.parametrize("own", [False, True])
def test_a_step_of_a_mixer_over_slots_of_a_pool(placed, changes, own, monkeypatch):
    """Three sequences whose states lie anywhere in a pool of six, with the convolution of causal_conv1d or our own."""
    m = mixer(**changes)
    if own:
        taken = (causal_conv1d_update, *cuda.load_step()[1:])
        monkeypatch.setattr(cuda, "load_step", lambda: taken)
    x, width = torch.randn(3, 32), m.conv1d.kernel_size[0]
    first = LayerState(torch.randn(3, width - 1, m.conv_dim), torch.randn(3, 4, 16, 16))
    expected, after = m(x[:, None], LayerState(first.conv.clone(), first.ssm.clone()))
    slots = torch.tensor([4, 0, 2] if placed else [0, 1, 2], dtype=torch.int32)
    conv, ssm = torch.randn(6, width - 1, m.conv_dim), torch.randn(6, 4, 16, 16)
    conv[slots.long()], ssm[slots.long()] = first.conv, first.ssm
    others = [row for row in range(6) if row not in slots.tolist()]
    untouched = conv[others].clone(), ssm[others].clone()
    with ops.force_path("cuda"):
        assert m.prepare_step(make=False) == "kernels"
        y, _ = m.step(x, LayerState(conv, ssm), slots if placed else None)
    assert_close(y, expected[:, 0], TOLERANCE, "outputs")
    assert_close(ssm[slots.long()], after.ssm, TOLERANCE, "states")
    assert_close(conv[slots.long()], after.conv, TOLERANCE, "inputs of the convolution")
    assert torch.equal(conv[others], untouched[0])
    assert torch.equal(ssm[others], untouched[1])


def test_what_the_kernels_do_not_take_runs_in_torch():
    with ops.force_path("cuda"):
        for changes, reason in (({"time_step_limit": (0.02, 0.5)}, "time_step_limit"), ({"conv_kernel": 5}, "5")):
            m = mixer(**changes)
            way = m.prepare_step(make=False)
            assert way.startswith("torch: ")
            assert reason in way
            assert isinstance(m.between, Between)
            assert m.between.kernels is None


@pytest.fixture(scope="module")
def model():
    own = tiny_model(SIZES | {"num_hidden_layers": 3}, connector_config=CONNECTOR)
    with ops.force_path("cuda"):
        assert prepare(own).decoding == "kernels"
    return own


@torch.inference_mode()
def test_answers_that_come_and_go_are_those_of_generate(model):
    """Sequences join and leave between steps that begin before the host knows the last tokens."""
    prompts, new = [prompt(9 + i, 1, seed=i) for i in range(3)], 6
    expected = [model.generate(ids, pixel_values=images(1), max_new_tokens=new, do_sample=False) for ids in prompts]
    expected = [row[0, ids.shape[1] :].tolist() for row, ids in zip(expected, prompts, strict=True)]
    decoder, made = Decoder(model, 5, ahead=True), {}
    with ops.force_path("cuda"):
        rows: list[int] = []
        for which in (0, 1, 2):
            out = model(prompts[which], pixel_values=images(1), use_cache=True)
            token = int(decoder.suppress(out.logits[:, -1]).argmax())
            decoder.add(out.cache_params, 0, token, None)
            rows.append(which)
            made[which] = [token]
            for _ in range(2):
                tokens = decoder.step([0.0] * len(rows)).get()
                for row, one in zip(rows, tokens, strict=True):
                    made[row].append(one)
        decoder.remove(0)
        rows = [2, 1]  # the last takes the free row
        for _ in range(3):
            for row, one in zip(rows, decoder.step([0.0, 0.0]).get(), strict=True):
                made[row].append(one)
    for which, tokens in made.items():
        assert tokens[:new] == expected[which][: len(tokens)]


@torch.inference_mode()
@pytest.mark.parametrize(("asked", "outside"), [(None, 11), ((0.7, 1.0), 23), ((0.7, 0.9), 40)])
def test_a_block_and_token_take_at_most_eight_launches(model, asked, outside):
    """Six: sum and norm, product, convolution, state, gated norm, product. What is outside the blocks (embedding, last
    norm, head, choice) does not grow with them."""
    rows = 6  # a CPU has a product of its own for fewer
    with ops.force_path("cuda"):
        decoder = Decoder(model, rows, ahead=True)
        out = model(prompt(6, seed=1), use_cache=True)
        for _ in range(rows):
            decoder.add(out.cache_params, 0, 5, asked)
        decoder.step([0.5] * rows)
        with counted_launches() as launches:
            decoder._forward(rows, "logits")
            decoder._choose(rows, "greedy" if asked is None else "cut" if asked[1] < 1 else "whole")
    blocks = len(model.language_model.backbone.layers)
    names = launches.names
    assert names.count("_selective_scan_update_kernel") == names.count("causal_conv1d_update") == blocks
    assert names.count("_layer_norm_fwd_1pass_kernel") == 2 * blocks + 1
    assert len(names) <= 6 * blocks + outside, names
