"""The choice of a token: the right distribution, the right nucleus, and each row by itself."""

import math

import pytest
import torch

from workflows.serve.sampling import Settings, choose, generator_of, log_probabilities

SHARES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


def draws(settings, logits, count=4000):
    """Shares of the ids that are chosen, with one generator."""
    generator = generator_of(settings)
    rows = logits.expand(count, -1)
    ids = choose(rows.clone(), [settings] * count, [generator] * count)
    return torch.bincount(torch.tensor(ids), minlength=logits.shape[-1]) / count


def test_ids_come_as_often_as_their_probability_says():
    found = draws(Settings(1, temperature=1.0, seed=0), SHARES.log())
    assert torch.allclose(found, SHARES, atol=0.03)


def test_temperature_sharpens_and_flattens():
    for temperature in (0.5, 2.0):
        found = draws(Settings(1, temperature=temperature, seed=0), SHARES.log())
        assert torch.allclose(found, torch.softmax(SHARES.log() / temperature, 0), atol=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, 1), (0.3, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.96, 5)])
def test_the_nucleus_is_the_fewest_that_reach_top_p(top_p, kept):
    order = torch.tensor([3, 0, 4, 1, 2])  # not sorted by probability
    found = draws(Settings(1, temperature=1.0, top_p=top_p, seed=0), SHARES[order].log(), 3000)
    expected = torch.where(SHARES[order] >= SHARES[kept - 1], SHARES[order], 0)
    assert torch.allclose(found, expected / expected.sum(), atol=0.04)


def test_a_flat_distribution_over_a_large_vocabulary_keeps_its_whole_nucleus():
    """More tokens are needed for top_p than are looked at first."""
    settings = Settings(1, temperature=1.0, top_p=0.9, seed=0)
    found = draws(settings, torch.linspace(0, 0.1, 2000), 6000)
    assert int((found > 0).sum()) > 1500
    assert found[:150].sum() == 0  # the least likely


def test_forbidden_tokens_never_come():
    logits = torch.zeros(50)
    logits[::2] = float("-inf")
    for settings in (
        Settings(1),
        Settings(1, temperature=2.0, seed=1),
        Settings(1, temperature=2.0, top_p=0.5, seed=1),
    ):
        assert draws(settings, logits, 500)[::2].sum() == 0


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    logits = torch.randn(6, 300) * 3
    kinds = [Settings(1), *(Settings(1, temperature=t, top_p=p, seed=5) for t, p in [(1, 1), (2, 0.9), (0.3, 0.1)])]
    settings = [kinds[i % 4] for i in range(6)]
    together = choose(logits.clone(), settings, [generator_of(s) for s in settings])
    alone = [choose(logits[i : i + 1].clone(), [settings[i]], [generator_of(settings[i])])[0] for i in range(6)]
    assert together == alone
    assert together[0] == int(logits[0].argmax())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_has_no_token(value):
    logits = torch.randn(3, 20)
    logits[1, 4] = value
    settings = [Settings(1), Settings(1, temperature=1.0, seed=0), Settings(1, temperature=1.0, top_p=0.5, seed=0)]
    ids = choose(logits, settings, [generator_of(s) for s in settings])
    assert [token is None for token in ids] == [False, True, False]


def test_log_probabilities():
    found = log_probabilities(SHARES.log()[None].repeat(2, 1), [3, 0], 2)
    assert found[0][0] == pytest.approx(math.log(0.1))
    assert found[1][0] == pytest.approx(math.log(0.4))
    assert [token for token, _ in found[0][1]] == [0, 1]
    assert found[0][1][1][1] == pytest.approx(math.log(0.3))
    assert log_probabilities(SHARES.log()[None], [0], 0)[0][1] == []
