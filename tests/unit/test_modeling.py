"""The model as transformers sees it: saving and loading, placing pictures, the loss, and training switches.

What `generate` does is in test_generate.py. Both use the tiny model of tests/tiny.py.
"""

import pytest
import torch
from closeness import assert_close
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import IMAGE_ID, PER_IMAGE, pictures, prompt, tiny_model
from torch.nn import functional as F

from mlmamba.conversation import IGNORE_INDEX
from mlmamba.mamba2 import Mamba2Block
from mlmamba.modeling import MLMambaForConditionalGeneration

LM = "language_model."
IDS = torch.cat([prompt(14, images=1, seed=1), prompt(14, images=1, seed=2)])


def labelled(ids: torch.Tensor, start: int) -> torch.Tensor:
    labels = ids.clone()
    labels[:, :start] = IGNORE_INDEX
    return labels


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_bit_for_bit(tmp_path, tied):
    model = tiny_model({"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    loaded = MLMambaForConditionalGeneration.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert (LM + "lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    with torch.no_grad():
        assert torch.equal(loaded(IDS, pictures(2)).logits, model(IDS, pictures(2)).logits)


def test_an_encoder_with_buffers_that_are_not_saved_loads_too(tmp_path):
    """DINOv3's rotary frequencies are computed, not saved; transformers would leave them empty."""
    vision = {"towers": [{"model": "vit_small_patch16_dinov3", "block": 1}], "image_size": 32}
    model = tiny_model(vision_config=vision)
    assert any("rope" in name for name, _ in model.named_non_persistent_buffers())
    model.save_pretrained(tmp_path)
    loaded = MLMambaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.vision(pictures(1)), model.vision(pictures(1)))


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["connector.projector.0.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the model, first \['connector.projector.0.bias'\]"):
        MLMambaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("how", ["loaded", "cast"])
def test_in_bfloat16_the_scan_parameters_and_the_state_stay_float32(tmp_path, how):
    model = tiny_model()
    if how == "loaded":
        model.save_pretrained(tmp_path)
        half = MLMambaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    else:
        half = tiny_model().to(torch.bfloat16)
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert exact == {name for name in dtypes if name.rsplit(".")[-1] in ("A_log", "dt_bias", "D")}
    assert all(torch.equal(half.get_parameter(name), model.get_parameter(name)) for name in exact)
    with torch.no_grad():
        output = half(IDS, pictures(2))
        assert {layer.ssm.dtype for layer in output.cache_params.layers} == {torch.float32}
        assert output.logits.dtype == torch.float32
        assert_close(output.logits, model(IDS, pictures(2)).logits, 0.1)


@torch.no_grad()
def test_features_stand_at_the_placeholders_in_order(model):
    ids = prompt(16, seed=3)
    ids[0, 1 : 1 + PER_IMAGE] = ids[0, 8 : 8 + PER_IMAGE] = IMAGE_ID
    both = pictures(2)
    features = model.get_image_features(both)
    embeds = model.get_input_embeddings()(ids)
    embeds[0, 1 : 1 + PER_IMAGE], embeds[0, 8 : 8 + PER_IMAGE] = features[0], features[1]
    expected = model(inputs_embeds=embeds).logits
    assert torch.equal(model(ids, both).logits, expected)
    assert torch.equal(model(ids, image_features=features).logits, expected)
    assert not torch.allclose(model(ids, both.flip(0)).logits, expected, atol=1e-3)


@torch.no_grad()
def test_text_alone_needs_no_picture(model):
    assert model(prompt(5)).logits.shape == (1, 5, model.config.text_config.vocab_size)


@pytest.mark.parametrize(("images", "given"), [(1, 0), (1, 2), (0, 1), (2, 1)])
def test_placeholders_and_pictures_must_match(model, images, given):
    message = rf"has {images * PER_IMAGE} image placeholders but {given} pictures of {PER_IMAGE} tokens were given"
    with pytest.raises(ValueError, match=message):
        model(prompt(12, images), pictures(given) if given else None)


def test_exactly_one_kind_of_input_is_needed(model):
    for inputs in ({}, {"input_ids": prompt(3), "inputs_embeds": torch.zeros(1, 3, 16)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**inputs)


@torch.no_grad()
def test_the_loss_is_the_mean_over_labels(model):
    labels = labelled(IDS, 9)
    labels[0, 11:] = IGNORE_INDEX
    output = model(IDS, pictures(2), labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss, expected, 1e-5)
    total = model(IDS, pictures(2), labels=labels, num_items_in_batch=torch.tensor(1.0)).loss
    assert_close(total, expected * 7, 1e-5)
    assert_close(model(IDS, pictures(2), labels=labels, num_items_in_batch=14).loss, expected / 2, 1e-5)


@torch.no_grad()
def test_a_batch_without_labels_has_no_loss_but_is_no_error(model):
    assert model(prompt(5), labels=torch.full((1, 5), IGNORE_INDEX)).loss == 0


@torch.no_grad()
def test_logits_of_the_last_positions_only_leave_the_loss_alone(model):
    labels = labelled(IDS, 6)
    full, short = (model(IDS, pictures(2), labels=labels, logits_to_keep=n) for n in (0, 2))
    assert short.logits.shape[1] == 2
    assert_close(short.logits, full.logits[:, -2:], 1e-6)
    assert torch.equal(short.loss, full.loss)


@torch.no_grad()
def test_loss_of_a_packed_row_is_that_of_its_sequences_alone(model):
    parts = [prompt(7, images=1, seed=1), prompt(5, seed=2), prompt(6, images=1, seed=3)]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 5, 6]))[None]
    labels = [part.masked_fill(part == IMAGE_ID, IGNORE_INDEX) for part in parts]
    x = pictures(2)
    whole = model(torch.cat(parts, 1), x, labels=torch.cat(labels, 1), seq_idx=seq_idx, num_items_in_batch=1).loss
    seen = [x[:1], None, x[1:]]
    alone = [
        model(part, pixels, labels=own, num_items_in_batch=1).loss
        for part, pixels, own in zip(parts, seen, labels, strict=True)
    ]
    assert_close(whole, sum(alone), 1e-5)
    unmarked = model(torch.cat(parts, 1), x, labels=torch.cat(labels, 1), num_items_in_batch=1).loss
    assert not torch.isclose(unmarked, whole)


def gradients_of(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, pictures(2), labels=labelled(IDS, 6), use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_gradient_checkpointing_wraps_the_blocks_and_changes_no_gradient():
    model, forwards = tiny_model().train(), []
    for module in model.modules():
        if isinstance(module, Mamba2Block):
            module.register_forward_pre_hook(lambda *args: forwards.append(1))
    plain = gradients_of(model)
    assert len(forwards) == 2
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    forwards.clear()
    again = gradients_of(model)
    assert len(forwards) == 4, "each block runs forward once more in the backward pass"
    assert set(plain) == set(again)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_every_part_learns():
    """All but what stands behind the chosen block of the encoder."""
    model = tiny_model().train()
    gradients = gradients_of(model)
    behind = ("vision.towers.0.model.blocks.5", "vision.towers.0.model.norm", "vision.towers.0.model.fc_norm")
    idle = [n for n, _ in model.named_parameters() if n not in gradients or not gradients[n].abs().sum() > 0]
    assert [name for name in idle if not name.startswith(behind)] == []


def test_a_frozen_encoder_stays_in_evaluation_mode():
    maps = {"towers": [{"model": "test_efficientnet", "stages": [0, 2]}], "image_size": 32, "grid": 2}
    model = tiny_model(vision_config=maps)
    model.train()
    assert model.vision.training
    model.vision.requires_grad_(False)
    model.train()
    assert model.training
    assert model.connector.training
    assert not any(module.training for module in model.vision.modules())
    before = {name: value.clone() for name, value in model.vision.state_dict().items()}
    assert not any(name.startswith("vision") for name in gradients_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.vision.state_dict().items())


def test_the_state_is_returned_outside_training_or_when_asked(model):
    trained = tiny_model().train()
    with torch.no_grad():
        assert model(prompt(3)).cache_params is not None
        assert model(prompt(3), use_cache=False).cache_params is None
        assert trained(prompt(3)).cache_params is None
        assert trained(prompt(3), use_cache=True).cache_params is not None
