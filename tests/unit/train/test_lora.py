"""LoRA through peft on the language model: trains, merges into the same logits, and its adapter saves and loads."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

import mlmamba  # noqa: F401 - registers the Auto classes
from mlmamba.conversation import IGNORE_INDEX
from tests.helpers.closeness import assert_close
from tests.helpers.tiny import images, pad, prompt, tiny_model

peft = pytest.importorskip("peft")

LANGUAGE = r"language_model\..*\.(in_proj|out_proj)"
IDS = torch.cat([prompt(14, images=1, seed=1), prompt(14, images=1, seed=2)])
LABELS = IDS.clone()
LABELS[:, :6] = IGNORE_INDEX


def adapted(model=None, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LANGUAGE, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(tiny_model() if model is None else model, config)


def moved(model):
    """With an adapter that does something: peft starts it at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, pixel_values=images(2), **inputs).logits


@pytest.mark.filterwarnings("error::FutureWarning")
def test_only_the_projections_of_the_language_model_are_adapted():
    model = adapted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # layers x projections x (A, B)
    assert all("language_model.backbone.layers" in name for name in trained)
    assert all("in_proj.lora_" in name or "out_proj.lora_" in name for name in trained)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_the_adapter_alone_and_lowers_the_loss(checkpointing):
    model = adapted().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, pixel_values=images(2), labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_merged_weights_give_the_logits_of_the_adapter():
    """Also that every path through a block uses the adapter: prefill, padding and decoding step by step."""
    plain, model = tiny_model(), moved(adapted())
    with_adapter = logits(model)
    assert (with_adapter - logits(plain)).abs().max() > 0.1
    with torch.no_grad():
        state, steps = model(input_ids=IDS[:, :5], pixel_values=images(2)).cache_params, []
        for t in range(5, 14):
            output = model(input_ids=IDS[:, t : t + 1], cache_params=state)
            state = output.cache_params
            steps.append(output.logits)
    assert_close(torch.cat(steps, dim=1), with_adapter[:, 5:], 1e-4, "decoding with the adapter")
    ids, mask = pad([prompt(9, seed=3), prompt(4, seed=4)], "left")
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    merged = model.merge_and_unload()
    assert type(merged) is type(plain)
    assert_close(logits(merged), with_adapter, 1e-5)
    with torch.no_grad():
        assert_close(merged(ids, attention_mask=mask).logits[mask.bool()], padded, 1e-5)


def test_an_adapter_saves_and_loads(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base)
    model = moved(adapted(AutoModelForImageTextToText.from_pretrained(base)))
    model.save_pretrained(adapter)
    assert (adapter / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size / 10
    loaded = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    assert torch.equal(logits(loaded), logits(model))
    named = AutoModelForImageTextToText.from_pretrained(adapter)  # finds the base by the name in the adapter's config
    assert torch.equal(logits(named), logits(model))
    again = tmp_path / "merged"
    model.merge_and_unload().save_pretrained(again)
    assert_close(logits(AutoModelForImageTextToText.from_pretrained(again)), logits(loaded), 1e-5)


def test_an_adapted_model_generates():
    model = moved(adapted())
    rows = [prompt(12, images=1, seed=1), prompt(7, images=1, seed=2)]
    ids, mask = pad(rows, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": images(2), **options}
    greedy, beams = model.generate(**inputs), model.generate(**inputs, num_beams=2)
    merged = model.merge_and_unload()
    assert torch.equal(greedy, merged.generate(**inputs))
    assert torch.equal(beams, merged.generate(**inputs, num_beams=2))
