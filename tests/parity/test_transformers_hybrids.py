"""Hybrids against transformers' own classes of each family, on the same random weights, read by the converter."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlmamba.convert import read_language_model
from mlmamba.mamba2 import Mamba2LanguageModel
from tests.helpers.closeness import assert_close
from tests.helpers.tiny import VOCABULARY, pad, prompt

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
MAMBA = {
    "num_hidden_layers": 4,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
GRANITE = MAMBA | {
    "model_type": "granitemoehybrid",
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 48,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 3.0,
    "attention_multiplier": 0.2,
    "rms_norm_eps": 1e-5,
}
FALCON = MAMBA | {
    "model_type": "falcon_h1",
    "mamba_d_ssm": 48,
    "intermediate_size": 48,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES = {
    "granitemoehybrid": GRANITE | {"tie_word_embeddings": True},
    "granitemoehybrid, rotary, biased": GRANITE
    | {"position_embedding_type": "rope", "attention_bias": True, "mamba_proj_bias": True, "num_key_value_heads": 4},
    "granitemoehybrid, attention alone": GRANITE
    | {"layer_types": ["full_attention"] * 4, "position_embedding_type": "rope"},
    "bamba": MAMBA | {"model_type": "bamba", "attn_layer_indices": [1, 3], "intermediate_size": 48, "mlp_bias": True},
    "falcon_h1": FALCON
    | {
        "embedding_multiplier": 5.6,
        "lm_head_multiplier": 0.08,
        "key_multiplier": 0.4,
        "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 0.7,
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.3,
        "ssm_multipliers": [0.35, 0.25, 0.2, 0.5, 0.3],
        "mlp_multipliers": [0.9, 0.4],
    },
    "falcon_h1, norm before gate": FALCON | {"mamba_rms_norm": True, "mamba_norm_before_gate": True},
    "falcon_h1, gated norm": FALCON | {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
    "nemotron_h": {
        "model_type": "nemotron_h",
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
        "intermediate_size": 48,
        "head_dim": 16,
        "ssm_state_size": 16,
        "mamba_num_heads": 6,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
        # transformers holds prompts' steps over time_step_min, but not those of decoding. The published limit is none.
        "time_step_min": 1e-6,
    },
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=FAMILIES.keys())
def pair(request, tmp_path_factory):
    """Both with the same random weights, in which no two parameters are alike."""
    torch.manual_seed(0)
    fields = COMMON | FAMILIES[request.param]
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("family")
    theirs.save_pretrained(folder)
    model = read_language_model(folder)
    ours = Mamba2LanguageModel(model.config).eval()
    tensors = dict(model.tensors)
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
    ours.load_state_dict(tensors, strict=True)
    return theirs, ours


def run(ours: Mamba2LanguageModel, ids: torch.Tensor, state=None, mask=None, seq_idx=None):
    hidden, state = ours.backbone(ours.backbone.embeddings(ids), state, mask, seq_idx)
    return ours.lm_head(hidden), state


@pytest.mark.parametrize("length", [1, 7, 8, 41])
def test_logits_are_the_same(pair, length):
    theirs, ours = pair
    ids = prompt(length)
    with torch.no_grad():
        assert_close(run(ours, ids)[0], theirs(ids).logits, TOLERANCE)


def test_decoding_after_a_prompt_is_the_same(pair):
    theirs, ours = pair
    ids = prompt(17)
    with torch.no_grad():
        out, (logits, state) = theirs(ids, use_cache=True), run(ours, ids)
        assert_close(logits, out.logits, TOLERANCE)
        for step in range(6):
            token, place = torch.tensor([[5 + step]]), torch.tensor([[17 + step]])  # Bamba does not count up by itself
            out = theirs(token, past_key_values=out.past_key_values, position_ids=place, use_cache=True)
            logits, state = run(ours, token, state.in_place())
            assert_close(logits, out.logits, TOLERANCE)


def test_left_padding_is_the_same(pair):
    theirs, ours = pair
    if ours.backbone.layers[0].mixer.in_proj.bias is not None:
        pytest.skip("transformers lets biases leak into left padding (tests/parity/test_transformers_mamba2.py)")
    rows = [prompt(9, seed=1), prompt(14, seed=2), prompt(5, seed=3)]
    ids, mask = pad(rows, "left")
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        truth = theirs(ids, attention_mask=mask, position_ids=places).logits
        logits = run(ours, ids, mask=mask.bool())[0]
        seen = mask.bool()
        assert_close(logits[seen], truth[seen], TOLERANCE)


def test_gradients_are_the_same(pair):
    """Of the embedding: it gets what went through every block."""
    theirs, ours = pair
    ids = prompt(23)
    found = []
    for embedding, logits in (
        (theirs.get_input_embeddings().weight, theirs(ids).logits),
        (ours.backbone.embeddings.weight, run(ours, ids)[0]),
    ):
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        found.append(torch.autograd.grad(loss, embedding)[0])
    assert_close(found[1], found[0], TOLERANCE)
