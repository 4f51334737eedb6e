"""Answers weigh by how often they are given, a token 1 on average, and the loss counts them so."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mlmamba.conversation import IGNORE_INDEX as NO
from tests.unit.train.test_step import LENGTH, row
from workflows.train.answers import AnswerWeights, count_answers, runs
from workflows.train.step import batch_maker


def test_runs_end_at_questions_and_at_the_border_of_samples():
    labels = np.array([NO, 5, 6, NO, 7, 8, 9, NO, 4], dtype=np.int32)  # the 8 opens a sample: nothing predicts it
    answers, of = runs(labels, np.array([0, 0, 0, 0, 0, 1, 1, 1, 1]))
    assert [answer.tolist() for answer in answers] == [[5, 6], [7], [9], [4]]
    assert of.tolist() == [0, 0, 1, 2, 3]
    assert runs(np.full(4, NO, dtype=np.int32), np.zeros(4))[0] == []


@pytest.mark.parametrize(("balance", "ratio"), [(0, 1), (0.5, 3), (1, 9)])
def test_a_rare_answer_weighs_more_and_a_token_one_on_average(balance, ratio):
    often, seldom = (np.array(ids, dtype=np.int32).tobytes() for ids in ([5, 6], [7]))
    weights = AnswerWeights(Counter({often: 90, seldom: 10}), balance)
    own = weights.of(np.array([[NO, 5, 6, NO, 7]]), np.zeros((1, 5)))
    assert own[2] / own[0] == pytest.approx(ratio)
    assert 90 * (own[0] + own[1]) + 10 * own[2] == pytest.approx(190)
    assert "2 different answers weigh between" in weights.told()


class Rows:
    """Four rows as a data set."""

    manifest = SimpleNamespace(max_tokens=LENGTH)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return row(index)

    def rows(self, indices):
        return [row(int(i)) for i in indices]


def test_the_loss_is_the_weighted_sum(model):
    counts = count_answers(Rows())
    assert counts.total() == 8
    counts[next(iter(counts))] += 6  # else all are given once
    weights = AnswerWeights(counts, 1.0)
    (plain,), (weighted,) = (batch_maker(Rows(), 2, model, weights=one)(np.arange(2)) for one in (None, weights))
    positions = weighted.inputs["positions"]
    assert len(positions.weights) == weighted.predicted == plain.predicted
    model.eval()
    with torch.no_grad():
        loss = model(**weighted.inputs, num_items_in_batch=1).loss
        hidden, _ = model.language_model.backbone(*_embedded(model, plain), None, None, plain.inputs["seq_idx"], False)
        logits = model.language_model.lm_head(hidden.flatten(0, 1)[positions.labelled]).float()
        each = torch.nn.functional.cross_entropy(logits, positions.targets, reduction="none")
    assert positions.weights.min() < positions.weights.max()
    assert loss.item() == pytest.approx((each * positions.weights).sum().item(), rel=1e-5)


def _embedded(model, batch):
    embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
    features = model.get_image_features(batch.inputs["pixel_values"])
    return (model._place_at(embeds, features, batch.inputs["positions"].images),)
