"""The whole model on the CUDA path against the torch path: padded prompts with images, states, generated text, and a
packed training step with every gradient. Float32, within 1e-5."""

import pytest
import torch

from mlmamba import ops
from mlmamba.modeling import MLMambaForConditionalGeneration
from tests.helpers.closeness import assert_close
from tests.helpers.tiny import images, pad, prompt, tiny_config, tiny_model

TOLERANCE = 1e-5
SIZES = {"state_size": 16, "head_dim": 16, "num_heads": 4, "hidden_size": 32, "chunk_size": 16}
"""The kernels are written for head sizes and states of 16 and more."""
CONNECTOR = {"name": "msc_advanced", "head_dim": 16, "state_size": 16, "chunk_size": 16, "hidden_size": 16}


@pytest.fixture(scope="module")
def whole():
    return tiny_model(SIZES, connector_config=CONNECTOR)


def on_both_paths(call):
    """What a function returns on the CUDA path and on the torch path."""
    found = []
    for path in ("cuda", "torch"):
        with ops.force_path(path), torch.no_grad():
            found.append(call())
    return found


def assert_same_states(ours, truth):
    for a, b in zip(ours.layers, truth.layers, strict=True):
        assert_close(a.ssm, b.ssm, TOLERANCE, "state")
        assert_close(a.conv, b.conv, TOLERANCE, "inputs of the convolution")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_with_images(whole, side):
    ids, mask = pad([prompt(20, 1, seed=1), prompt(9, 1, seed=2)], side)
    ours, truth = on_both_paths(lambda: whole(ids, pixel_values=images(2), attention_mask=mask))
    assert_close(ours.logits[mask.bool()], truth.logits[mask.bool()], TOLERANCE, "logits")
    assert_same_states(ours.cache_params, truth.cache_params)


@pytest.mark.parametrize("scan", ["bsm", "csm"])
def test_the_scans_of_the_connector(scan):
    own = tiny_model(SIZES, connector_config=CONNECTOR | {"scan": scan})
    ours, truth = on_both_paths(lambda: own.get_image_features(images(2)))
    assert_close(ours, truth, TOLERANCE, "image features")


@pytest.mark.parametrize("more", [1, 5])
def test_a_prompt_that_goes_on_from_a_state(whole, more):
    first, rest = prompt(11, 1, seed=6), prompt(more, seed=7)

    def read():
        state = whole(first, pixel_values=images(1)).cache_params
        return whole(rest, cache_params=state)

    ours, truth = on_both_paths(read)
    assert_close(ours.logits, truth.logits, TOLERANCE, "logits")
    assert_same_states(ours.cache_params, truth.cache_params)


def test_generated_text(whole):
    ids, mask = pad([prompt(12, 1, seed=1), prompt(7, 1, seed=2)], "left")
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    ours, truth = on_both_paths(lambda: whole.generate(input_ids=ids, pixel_values=images(2), **options))
    assert torch.equal(ours, truth)


def test_a_packed_training_step_with_every_gradient():
    ids = torch.cat([prompt(9, 1, seed=3), prompt(8, 1, seed=4), prompt(6, seed=5)], 1)
    seq_idx = torch.tensor([[0] * 9 + [1] * 8 + [2] * 6])
    labels = ids.masked_fill(ids == 1, -100)
    torch.manual_seed(0)  # weights as they begin: with those of `tiny_model` the torch path itself is 1e-5 off
    model = MLMambaForConditionalGeneration(tiny_config(SIZES, connector_config=CONNECTOR)).train()
    losses, found = [], []
    for path in ("cuda", "torch"):
        model.zero_grad()
        with ops.force_path(path):
            loss = model(ids, pixel_values=images(2), labels=labels, seq_idx=seq_idx, use_cache=False).loss
            loss.backward()
        losses.append(loss)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    ours, truth = found
    assert_close(*losses, TOLERANCE, "loss")
    assert ours.keys() == truth.keys()
    assert {name.split(".")[0] for name in ours} == {"vision", "connector", "language_model"}
    for name, gradient in truth.items():
        assert_close(ours[name], gradient, TOLERANCE, f"gradient of {name}")
