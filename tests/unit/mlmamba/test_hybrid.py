"""A hybrid as a transformers model: it saves and loads, generates, takes adapters, and trains under checkpointing."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

import mlmamba  # noqa: F401 - registers the Auto classes
from mlmamba.modeling import MLMambaForConditionalGeneration
from tests.helpers.closeness import assert_close
from tests.helpers.tiny import HYBRID, images, pad, prompt, tiny_model

ROWS = [prompt(9, 1, 1), prompt(14, 1, 2), prompt(5, 1, 3)]
IMAGES = images(3)
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model(HYBRID)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(ROWS[1], IMAGES[1:2]).logits


def test_it_saves_and_loads_strictly(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")), logits(model))
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["text_config"]["layers"] == HYBRID["layers"]
    config["text_config"] |= {"layers": ["mamba2", "mlp", "attention", "mlp", "mlp"]}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks 2 tensors of the model"):
        MLMambaForConditionalGeneration.from_pretrained(tmp_path / "whole")


def test_a_pure_model_saved_before_there_were_hybrids_loads(tmp_path):
    pure = tiny_model()
    pure.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    known = ("vocab_size", "num_heads", "head_dim", "hidden_size", "state_size", "num_hidden_layers", "n_groups")
    other = ("chunk_size", "expand", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    old = {name: config["text_config"][name] for name in (*known, *other)}
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": old | {"model_type": "mamba2"}}))
    assert torch.equal(logits(MLMambaForConditionalGeneration.from_pretrained(tmp_path)), logits(pure))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_gives_each_row_what_it_gets_alone(model, side, options):
    ids, mask = pad(ROWS, side)
    out = model.generate(ids, attention_mask=mask, pixel_values=IMAGES, **GREEDY, **options)[:, ids.shape[1] :]
    each = options.get("num_return_sequences", 1)
    for i, row in enumerate(ROWS):
        alone = model.generate(row, pixel_values=IMAGES[i : i + 1], **GREEDY, **options)[:, row.shape[1] :]
        own = out[each * i : each * i + each]
        longest = min(own.shape[1], alone.shape[1])
        assert torch.equal(own[:, :longest], alone[:, :longest])
        assert not own[:, longest:].any()
        assert not alone[:, longest:].any()


def test_a_conversation_goes_on_from_the_state_that_generate_returned(model):
    ids, mask = pad(ROWS, "left")
    first = model.generate(ids, attention_mask=mask, pixel_values=IMAGES, return_dict_in_generate=True, **GREEDY)
    turns = [prompt(4, 0, 7), prompt(6, 0, 8), prompt(2, 0, 9)]
    new, seen = pad(turns, "left")
    more = model.generate(new, attention_mask=seen, cache_params=first.cache_params, **GREEDY)[:, new.shape[1] :]
    for i, turn in enumerate(turns):
        whole = torch.cat([torch.tensor([first.cache_params.read[i]]), turn], 1)
        assert torch.equal(
            more[i : i + 1], model.generate(whole, pixel_values=IMAGES[i : i + 1], **GREEDY)[:, whole.shape[1] :]
        )


def test_checkpointing_changes_no_gradient(model):
    labels = ROWS[1].masked_fill(ROWS[1] == 1, -100)
    found = []
    for checkpointing in (False, True):
        own = tiny_model(HYBRID).train()
        if checkpointing:
            own.gradient_checkpointing_enable()
        own(ROWS[1], IMAGES[1:2], labels=labels).loss.backward()
        found.append([p.grad for p in own.parameters() if p.grad is not None])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_in_half_precision_it_runs_with_its_states_parameters_in_float32():
    half = tiny_model(HYBRID).bfloat16()
    assert {p.dtype for name, p in half.named_parameters() if name.endswith(("A_log", ".D", "dt_bias"))} == {
        torch.float32
    }
    with torch.no_grad():
        out = half(ROWS[1], IMAGES[1:2])
        after = half(torch.tensor([[9]]), cache_params=out.cache_params).logits
    assert torch.isfinite(after).all()
    assert_close(out.logits, logits(tiny_model(HYBRID)), 0.2)


def test_adapters_go_on_every_mixer_and_merge_into_the_same_logits():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r"language_model\..*\.(in_proj|out_proj)")
    adapted = peft.get_peft_model(tiny_model(HYBRID), config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=ROWS[1], pixel_values=IMAGES[1:2], labels=ROWS[1].masked_fill(ROWS[1] == 1, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    layers = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(layers) == 2 * 6  # five blocks, one of them with two mixers
    adapted.eval()
    with torch.no_grad():
        before = adapted(input_ids=ROWS[1], pixel_values=IMAGES[1:2]).logits
        state = adapted(input_ids=ROWS[1][:, :6], pixel_values=IMAGES[1:2]).cache_params
        for t in range(6, 14):
            out = adapted(input_ids=ROWS[1][:, t : t + 1], cache_params=state)
            state = out.cache_params
        assert_close(out.logits[0, 0], before[0, -1], 1e-4)
    assert_close(logits(adapted.merge_and_unload()), before, 1e-5)
