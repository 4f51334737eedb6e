"""How the next token of every row is chosen, on the device: nothing here waits for it.

A row's choice depends only on its own logits and its own draw in [0, 1). Shapes: n rows, V vocabulary.
"""

import torch
from torch import Tensor


def choose(logits: Tensor, sampled: Tensor, temperature: Tensor, top_p: Tensor, draws: Tensor, cut: bool) -> Tensor:
    """Choose a token for each row, greedily or at random, -1 where its logits are not finite.

    Args:
        logits: (n, V) float32; -inf at tokens that must not come.
        sampled: (n,) bool, False for the most likely token.
        temperature, top_p: (n,) float32, of rows that are sampled.
        draws: (n,) float64.
        cut: whether any row has a top_p under 1, for which the vocabulary is sorted.

    Returns:
        (n,) int64.
    """
    best, ids = logits.max(-1)
    probabilities = torch.softmax(logits / torch.where(sampled, temperature, 1.0)[:, None], -1)
    drawn = draw(probabilities, draws)
    if cut:
        values, order = probabilities.sort(dim=-1, descending=True)
        drawn = torch.where(top_p < 1, draw_nucleus(values, order, draws, top_p), drawn)
    return finite(torch.where(sampled, drawn, ids), best)


def greedy(logits: Tensor) -> Tensor:
    """As `choose`, the most likely token of each row (n, V) -> (n,)."""
    best, ids = logits.max(-1)
    return finite(ids, best)


def finite(ids: Tensor, best: Tensor) -> Tensor:
    """ids (n,), -1 where the largest logit (n,) is no number."""
    return torch.where(best.isfinite(), ids, -1)


def draw(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Sample an index (n,) per row: invert its cumulative distribution (n, V) at the draw (n,) in [0, 1)."""
    mass = probabilities.double().cumsum(dim=-1)
    places = torch.searchsorted(mass, draws[:, None] * mass[:, -1:], right=True)
    return places[:, 0].clamp(max=probabilities.shape[1] - 1)  # a row of NaN gives no valid index


def draw_nucleus(values: Tensor, order: Tensor, draws: Tensor, top_p: Tensor) -> Tensor:
    """As `draw`, from the fewest most likely tokens that together have probability top_p (n,).

    Args:
        values, order: (n, k), the most likely tokens' probabilities, falling, and the tokens.
    """
    before = values.double().cumsum(dim=-1) - values
    values = values.masked_fill(before >= top_p[:, None], 0.0)
    values[:, 0] = values[:, 0].clamp(min=torch.finfo(values.dtype).tiny)  # top_p 0 keeps the most likely
    return order.gather(1, draw(values, draws)[:, None])[:, 0]
