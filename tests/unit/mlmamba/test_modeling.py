"""The model as transformers sees it: placing images, reading in pieces, the loss, and training switches.

Saving and loading is in test_saving.py, what `generate` does in test_generate.py; bad input is in test_bad_input.py.
"""

import pytest
import torch
from torch.nn import functional as F

from mlmamba.conversation import IGNORE_INDEX
from mlmamba.mamba2 import Mamba2Block
from tests.helpers.closeness import assert_close
from tests.helpers.images import image
from tests.helpers.tiny import IMAGE_ID, NATIVE, PER_IMAGE, images, pad, prompt, tiny_model

IDS = torch.cat([prompt(14, images=1, seed=1), prompt(14, images=1, seed=2)])


def labelled(ids: torch.Tensor, start: int) -> torch.Tensor:
    labels = ids.clone()
    labels[:, :start] = IGNORE_INDEX
    return labels


@torch.no_grad()
def test_features_stand_at_the_placeholders_in_order(model):
    ids = prompt(16, seed=3)
    ids[0, 1 : 1 + PER_IMAGE] = ids[0, 8 : 8 + PER_IMAGE] = IMAGE_ID
    both = images(2)
    features = model.get_image_features(both)
    embeds = model.get_input_embeddings()(ids)
    embeds[0, 1 : 1 + PER_IMAGE], embeds[0, 8 : 8 + PER_IMAGE] = features[0], features[1]
    expected = model(inputs_embeds=embeds).logits
    assert torch.equal(model(ids, both).logits, expected)
    assert torch.equal(model(ids, image_features=features).logits, expected)
    assert not torch.allclose(model(ids, both.flip(0)).logits, expected, atol=1e-3)


PIECES = [(1,) * 20, (3, 17), (2, 1, 9, 8), (10, 10), (19, 1)]


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@torch.no_grad()
def test_a_prompt_in_pieces_equals_the_prompt_at_once(model, pieces):
    """Pieces that cut through images and padding: a row padded on the left, one on the right, one of two images.

    Each placeholder of a piece gets its own vector: `image_features` of two dimensions.
    """
    rows = [prompt(9, images=1, seed=1), prompt(13, images=1, seed=2), prompt(20, images=2, seed=3)]
    ids, mask = pad(rows, "left")
    ids[1], mask[1] = ids[1].roll(-7), mask[1].roll(-7)
    features = model.get_image_features(images(4))
    whole = model(ids, image_features=features, attention_mask=mask)
    vectors = iter(features.flatten(0, 1).split((ids == IMAGE_ID).sum(1).tolist()))
    of_place = torch.zeros(*ids.shape, features.shape[-1])
    for row in range(3):
        of_place[row, ids[row] == IMAGE_ID] = next(vectors)
    state, logits = None, []
    for start, piece, seen in zip(
        torch.tensor((0, *pieces)).cumsum(0), ids.split(pieces, 1), mask.split(pieces, 1), strict=False
    ):
        places = piece == IMAGE_ID
        vectors = of_place[:, start : start + piece.shape[1]][places]
        output = model(piece, image_features=vectors, attention_mask=seen, cache_params=state)
        state = output.cache_params
        logits.append(output.logits)
    real = mask.bool()
    assert_close(torch.cat(logits, dim=1)[real], whole.logits[real], 2e-5, "logits")
    for ours, truth in zip(state.layers, whole.cache_params.layers, strict=True):
        assert_close(ours.ssm, truth.ssm, 2e-5, "SSM state")
        assert_close(ours.conv, truth.conv, 2e-5, "convolution state")


@torch.no_grad()
def test_text_alone_needs_no_image(model):
    assert model(prompt(5)).logits.shape == (1, 5, model.config.text_config.vocab_size)


@pytest.mark.parametrize(("prompted", "given"), [(1, 0), (1, 2), (0, 1), (2, 1)])
def test_placeholders_and_images_must_match(model, prompted, given):
    shown = rf"{given} images of {PER_IMAGE} tokens" if given else "no images"
    message = rf"has {prompted * PER_IMAGE} image placeholders but {shown} were given"
    with pytest.raises(ValueError, match=message):
        model(prompt(12, prompted), images(given) if given else None)


def test_exactly_one_kind_of_input_is_needed(model):
    for inputs in ({}, {"input_ids": prompt(3), "inputs_embeds": torch.zeros(1, 3, 16)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**inputs)


@torch.no_grad()
def test_the_loss_is_the_mean_over_labels(model):
    labels = labelled(IDS, 9)
    labels[0, 11:] = IGNORE_INDEX
    output = model(IDS, images(2), labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss, expected, 1e-5)
    total = model(IDS, images(2), labels=labels, num_items_in_batch=torch.tensor(1.0)).loss
    assert_close(total, expected * 7, 1e-5)
    assert_close(model(IDS, images(2), labels=labels, num_items_in_batch=14).loss, expected / 2, 1e-5)


@torch.no_grad()
def test_a_batch_without_labels_has_no_loss_but_is_no_error(model):
    assert model(prompt(5), labels=torch.full((1, 5), IGNORE_INDEX)).loss == 0


@torch.no_grad()
def test_logits_of_the_last_positions_only_leave_the_loss_alone(model):
    labels = labelled(IDS, 6)
    full, short = (model(IDS, images(2), labels=labels, logits_to_keep=n) for n in (0, 2))
    assert short.logits.shape[1] == 2
    assert_close(short.logits, full.logits[:, -2:], 1e-6)
    assert torch.equal(short.loss, full.loss)


@torch.no_grad()
def test_loss_of_a_packed_row_is_that_of_its_sequences_alone(model):
    parts = [prompt(7, images=1, seed=1), prompt(5, seed=2), prompt(6, images=1, seed=3)]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 5, 6]))[None]
    labels = [part.masked_fill(part == IMAGE_ID, IGNORE_INDEX) for part in parts]
    x = images(2)
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
    model(IDS, images(2), labels=labelled(IDS, 6), use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def blocks_of(model) -> list[Mamba2Block]:
    return [module for module in model.modules() if isinstance(module, Mamba2Block)]


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing_wraps_the_blocks_and_changes_no_gradient(name):
    """transformers renamed the methods; both names work and neither warns."""
    model, forwards = tiny_model().train(), []
    for block in blocks_of(model):
        block.register_forward_pre_hook(lambda *args: forwards.append(torch.is_grad_enabled()))
    plain = gradients_of(model)
    assert len(forwards) == 2
    getattr(model, f"{name}_enable")()
    assert model.is_gradient_checkpointing
    assert model.is_activation_checkpointing
    forwards.clear()
    again = gradients_of(model)
    assert len(forwards) == 4, "each block runs forward once more in the backward pass"
    assert set(plain) == set(again)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    getattr(model, f"{name}_disable")()
    assert not model.is_gradient_checkpointing
    forwards.clear()
    gradients_of(model)
    assert len(forwards) == 2


def saved_bytes(model, ids: torch.Tensor) -> int:
    """What autograd keeps for the backward pass beside the weights, each tensor once."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
    size = sum(storage.nbytes() for storage in kept.values())
    del loss
    return size


def test_gradient_checkpointing_saves_memory():
    """Of six blocks, what is kept grows with the length by little more than their inputs."""
    model = tiny_model({"num_hidden_layers": 6}).train()
    ids = prompt(60)
    plain = saved_bytes(model, ids)
    model.gradient_checkpointing_enable()
    assert saved_bytes(model, ids) < plain / 3


@pytest.mark.parametrize("options", [{"every_n_layers": 2}, {"offload": True}])
def test_gradient_checkpointing_has_no_other_options(options):
    with pytest.raises(ValueError, match=f"it has no option .*{next(iter(options))}"):
        tiny_model().activation_checkpointing_enable(**options)


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


@pytest.fixture(scope="module")
def own_size():
    """A model that reads images at their own size."""
    return tiny_model(vision_config=NATIVE)


def at_own_size(model, *sizes: tuple[int, int]) -> tuple[dict, list[int]]:
    layout = model.image_layout
    cuts = [layout.cut(image(i, size)) for i, size in enumerate(sizes)]
    return layout.batch(cuts), [cut.tokens for cut in cuts]


@torch.no_grad()
def test_images_of_different_sizes_stand_in_one_packed_row(own_size):
    batch, counts = at_own_size(own_size, (32, 32), (80, 48), (16, 64))
    assert counts == [4, 12, 4]
    rows = [torch.cat([torch.full((1, n), IMAGE_ID), prompt(5, seed=n + i)], 1) for i, n in enumerate(counts)]
    seq_idx = torch.cat([torch.full_like(row, i) for i, row in enumerate(rows)], 1)
    packed = own_size(torch.cat(rows, 1), **batch, seq_idx=seq_idx).logits
    for i, own in enumerate(packed.split([row.shape[1] for row in rows], 1)):
        alone = own_size.image_layout.batch([own_size.image_layout.cut(image(i, [(32, 32), (80, 48), (16, 64)][i]))])
        assert_close(own, own_size(rows[i], **alone).logits, 1e-5)


@torch.no_grad()
def test_generate_and_beams_take_images_of_different_sizes(own_size):
    batch, counts = at_own_size(own_size, (32, 32), (80, 48), (16, 64))
    rows = [
        torch.cat([torch.full((1, counts[0]), IMAGE_ID), prompt(5, seed=1)], 1),
        torch.cat([torch.full((1, counts[1] + counts[2]), IMAGE_ID), prompt(7, seed=2)], 1),
    ]
    ids, mask = pad(rows, "left")
    for options in ({}, {"num_beams": 2}):
        out = own_size.generate(ids, attention_mask=mask, **batch, max_new_tokens=4, do_sample=False, **options)
        features = own_size.get_image_features(**batch)
        alone = own_size.generate(rows[1], image_features=features[4:], max_new_tokens=4, do_sample=False, **options)
        assert out[1, ids.shape[1] :].tolist() == alone[0, rows[1].shape[1] :].tolist()


def test_what_does_not_fit_the_placeholders_is_refused_at_any_size(own_size):
    batch, _ = at_own_size(own_size, (32, 32), (80, 48))
    with pytest.raises(ValueError, match=r"has 4 image placeholders but 2 images of 4 to 12 tokens were given .16 "):
        own_size(prompt(9, images=1), **batch)
    ids = torch.full((2, 8), IMAGE_ID)
    with pytest.raises(ValueError, match="row 0 ends within an image"):
        own_size(ids, **batch)
    with pytest.raises(ValueError, match="need spatial_shapes"):
        own_size(ids, batch["pixel_values"])


def test_every_part_trains_at_any_size_and_without_an_image(own_size):
    batch, counts = at_own_size(own_size, (32, 32), (80, 48))
    ids = torch.cat([torch.full((1, sum(counts)), IMAGE_ID), prompt(6, seed=1)], 1)
    model = tiny_model(vision_config=NATIVE).train()
    model(ids, **batch, labels=labelled(ids, sum(counts))).loss.backward()
    idle = [n for n, p in model.connector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle
    none = model.image_layout.batch([])
    assert model(prompt(6), **none, labels=prompt(6)).loss > 0
