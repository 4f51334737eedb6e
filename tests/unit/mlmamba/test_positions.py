"""Positions found on the CPU give the loss and the gradients that labels give, to the last bit, and refuse the same."""

import pytest
import torch

from mlmamba.conversation import IGNORE_INDEX
from mlmamba.positions import find_positions
from tests.helpers.tiny import IMAGE_ID, PER_IMAGE, VOCABULARY, images, prompt, tiny_model


def batch() -> dict:
    """Two packed rows with an image each, padding at their ends."""
    ids = torch.cat([torch.cat([prompt(9, 1, seed=i), prompt(6, seed=i + 5), prompt(4, seed=9)], 1) for i in (1, 2)])
    seq_idx = torch.tensor([[0] * 9 + [1] * 6 + [2] * 4, [0] * 7 + [1] * 8 + [2] * 4])
    labels = ids.masked_fill((ids == IMAGE_ID) | (seq_idx == 2), IGNORE_INDEX)
    labels[1, 3:6] = IGNORE_INDEX
    return {"input_ids": ids, "seq_idx": seq_idx, "labels": labels}


def found(given: dict, count: int, config):
    return find_positions(given["input_ids"], given["labels"], given["seq_idx"], [PER_IMAGE] * count, config)


@pytest.mark.parametrize("count", [None, torch.tensor(7.0)])
def test_loss_and_gradients_are_those_of_labels(count):
    model, given, results = tiny_model().train(), batch(), []
    by_position = {name: value for name, value in given.items() if name != "labels"}
    by_position["positions"] = found(given, 2, model.config)
    for inputs in (given, by_position):
        model.zero_grad()
        loss = model(**inputs, pixel_values=images(2), num_items_in_batch=count).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (other, others) = results
    assert torch.equal(loss, other)
    assert gradients.keys() == others.keys()
    assert [name for name in gradients if not torch.equal(gradients[name], others[name])] == []


def test_a_batch_without_images_and_one_without_labels(model):
    given = batch()
    given["input_ids"] = given["input_ids"].masked_fill(given["input_ids"] == IMAGE_ID, 5)
    given["labels"] = torch.full_like(given["labels"], IGNORE_INDEX)
    positions = found(given, 0, model.config)
    out = model(given["input_ids"], seq_idx=given["seq_idx"], positions=positions, pixel_values=images(0))
    assert out.loss == 0
    assert torch.equal(out.logits, model(given["input_ids"], seq_idx=given["seq_idx"]).logits)


def test_the_same_is_refused_as_by_the_model(model):
    given, config = batch(), model.config
    with pytest.raises(ValueError, match="the prompt has 8 image placeholders but 1 images of 4 tokens were given"):
        found(given, 1, config)
    with pytest.raises(ValueError, match="the prompt has 8 image placeholders but no images were given"):
        found(given, 0, config)
    given["input_ids"][0, 12] = VOCABULARY
    with pytest.raises(ValueError, match=f"holds ids from 1 to {VOCABULARY}; the vocabulary is 0 to"):
        found(given, 2, config)
    given = batch()
    given["input_ids"][0, 3], given["input_ids"][1, 4] = 5, IMAGE_ID
    with pytest.raises(ValueError, match="row 0 has 3 image placeholders, no multiple of the 4 tokens of an image"):
        found(given, 2, config)


def test_positions_stand_in_place_of_labels(model):
    given = batch()
    positions = found(given, 2, model.config)
    with pytest.raises(ValueError, match="in place of labels"):
        model(**given, positions=positions, pixel_values=images(2))
    with pytest.raises(ValueError, match="without an attention_mask"):
        model(given["input_ids"], attention_mask=torch.ones(2, 19), positions=positions, pixel_values=images(2))
    with pytest.raises(ValueError, match="the positions are of 8 image placeholders, 4 embeddings were given"):
        model(given["input_ids"], positions=positions, pixel_values=images(1))
