"""Our Mamba-2 against transformers' Mamba2ForCausalLM with the same weights: same keys, same logits, same decoding.

What transformers gets wrong is pinned too, so that we hear of it when that changes: its CPU path ignores `seq_idx`,
decoding forgets the limits of the time step, and biases leak into left padding.
"""

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from mlmamba.mamba2 import Mamba2LanguageModel
from tests.helpers.closeness import assert_close, relative_error
from tests.helpers.tiny import TEXT, pad, prompt

CONFIGS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "two groups": {"n_groups": 2},
    "biased, no conv bias": {"use_bias": True, "use_conv_bias": False},
    "wide kernel, long chunk": {"conv_kernel": 5, "chunk_size": 32, "state_size": 16},
    "clamped steps": {"time_step_limit": (0.03, 0.2)},
    "residual in half": {"residual_in_fp32": False, "expand": 4, "num_heads": 8},
    "chunks of one": {"chunk_size": 1},
    "many at once": {
        "n_groups": 4,
        "chunk_size": 7,
        "use_conv_bias": False,
        "tie_word_embeddings": False,
        "time_step_limit": (0.02, 0.3),
        "num_hidden_layers": 3,
    },
}
UNLIMITED = {name: changes for name, changes in CONFIGS.items() if "time_step_limit" not in changes}
UNBIASED = {name: changes for name, changes in UNLIMITED.items() if not changes.get("use_bias")}
LENGTHS = (1, 3, 4, 13, 41)  # chunks are of 4 where nothing else is said
TOLERANCE = 1e-4


def pair(**changes) -> tuple[Mamba2ForCausalLM, Mamba2LanguageModel]:
    """Both with the same random weights, in which no two parameters are alike."""
    config = Mamba2Config(**{**TEXT, **changes})
    torch.manual_seed(0)
    theirs = Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = Mamba2LanguageModel(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def run(ours: Mamba2LanguageModel, ids: torch.Tensor, state=None, mask=None, seq_idx=None):
    hidden, state = ours.backbone(ours.backbone.embeddings(ids), state, mask, seq_idx)
    return ours.lm_head(hidden), state


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_keys_and_shapes_map_one_to_one(changes):
    theirs, ours = pair(**changes)
    shapes = [{name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    tied = ours.lm_head.weight is ours.backbone.embeddings.weight
    assert tied is (theirs.lm_head.weight is theirs.backbone.embeddings.weight)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_logits_agree_at_every_length(changes):
    theirs, ours = pair(**changes)
    for length in LENGTHS:
        ids = torch.cat([prompt(length, seed=1), prompt(length, seed=2)])
        assert_close(run(ours, ids)[0], theirs(ids).logits, TOLERANCE, f"logits of {length} tokens")


def test_gradients_agree():
    theirs, ours = pair(n_groups=2)
    ids = torch.cat([prompt(13, seed=1), prompt(13, seed=2)])
    weights = torch.randn(2, 13, TEXT["vocab_size"])
    (run(ours, ids)[0] * weights).sum().backward()
    (theirs(ids).logits * weights).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[name].grad, TOLERANCE, f"gradient of {name}")


@pytest.mark.parametrize("changes", UNLIMITED.values(), ids=UNLIMITED.keys())
@torch.no_grad()
def test_decoding_step_by_step_agrees(changes):
    theirs, ours = pair(**changes)
    ids = torch.cat([prompt(12, seed=1), prompt(12, seed=2)])
    reference = theirs(ids[:, :6], use_cache=True)
    logits, state = run(ours, ids[:, :6])
    assert_close(logits, reference.logits, TOLERANCE)
    for t in range(6, 12):
        reference = theirs(ids[:, t : t + 1], cache_params=reference.cache_params, use_cache=True)
        logits, state = run(ours, ids[:, t : t + 1], state)
        assert_close(logits, reference.logits, TOLERANCE, f"logits of token {t}")


@pytest.mark.parametrize("changes", UNBIASED.values(), ids=UNBIASED.keys())
@torch.no_grad()
def test_left_padding_with_a_mask_agrees_in_prefill_and_decoding(changes):
    theirs, ours = pair(**changes)
    ids, mask = pad([prompt(13, seed=1), prompt(6, seed=2), prompt(1, seed=3)], "left")
    reference = theirs(ids, attention_mask=mask, use_cache=True)
    logits, state = run(ours, ids, mask=mask.bool())
    real = mask.bool()
    assert_close(logits[real], reference.logits[real], TOLERANCE)
    for token in (5, 90):
        following = torch.tensor([[token], [token + 1], [token + 2]])
        reference = theirs(following, cache_params=reference.cache_params, use_cache=True)
        logits, state = run(ours, following, state)
        assert_close(logits, reference.logits, TOLERANCE, f"logits of token {token}")


@torch.no_grad()
def test_transformers_ignores_boundaries_on_the_cpu_and_we_do_not():
    theirs, ours = pair()
    parts = [prompt(n, seed=n) for n in (5, 3, 6)]
    packed = torch.cat(parts, dim=1)
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 3, 6]))[None]
    alone = torch.cat([theirs(part).logits for part in parts], dim=1)
    assert_close(run(ours, packed, seq_idx=seq_idx)[0], alone, TOLERANCE)
    with_seq_idx = theirs(packed, seq_idx=seq_idx.int()).logits
    assert torch.equal(with_seq_idx, theirs(packed).logits)
    assert (with_seq_idx - alone).abs().max() > 0.01 * alone.abs().max()


@pytest.mark.parametrize("name", ["clamped steps", "many at once"])
@torch.no_grad()
def test_transformers_forgets_the_limits_of_the_step_in_decoding_and_we_do_not(name):
    """Its truth is its own prefill, which clamps."""
    theirs, ours = pair(**CONFIGS[name])
    ids = torch.cat([prompt(12, seed=1), prompt(12, seed=2)])
    whole = theirs(ids).logits
    reference, (_, state) = theirs(ids[:, :6], use_cache=True), run(ours, ids[:, :6])
    steps, their_steps = [], []
    for t in range(6, 12):
        logits, state = run(ours, ids[:, t : t + 1], state)
        reference = theirs(ids[:, t : t + 1], cache_params=reference.cache_params, use_cache=True)
        steps.append(logits)
        their_steps.append(reference.logits)
    assert_close(torch.cat(steps, dim=1), whole[:, 6:], TOLERANCE, "logits of decoding")
    assert relative_error(torch.cat(their_steps, dim=1), whole[:, 6:]) > 3 * TOLERANCE


@torch.no_grad()
def test_transformers_lets_biases_leak_into_left_padding_and_we_do_not():
    """It masks before the projection, whose bias then fills the padding that the convolution reads."""
    theirs, ours = pair(use_bias=True)
    rows = [prompt(13, seed=1), prompt(6, seed=2)]
    ids, mask = pad(rows, "left")
    alone = theirs(rows[1]).logits[0]
    assert_close(run(ours, ids, mask=mask.bool())[0][1, 7:], alone, TOLERANCE)
    assert relative_error(theirs(ids, attention_mask=mask).logits[1, 7:], alone) > 0.01
