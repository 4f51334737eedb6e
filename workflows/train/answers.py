"""Weights of answers by how often they are given, for corpora of which a few answers make up the most.

An answer is a run of tokens with labels. Its weight is its number in the training split to the power of minus
`balance`, and all weights together are scaled so that a token weighs 1 on average: the loss stays of one size, and a
learning rate that was good stays good.
"""

from collections import Counter

import numpy as np

from mlmamba.conversation import IGNORE_INDEX
from pipelines.packed import PackedDataset


def count_answers(dataset: PackedDataset) -> Counter[bytes]:
    """How often the training split gives each answer, by the bytes of its int32 token ids. Reads every row."""
    counts: Counter[bytes] = Counter()
    for index in range(len(dataset)):
        row = dataset[index]
        counts.update(answer.tobytes() for answer in runs(row.labels, row.seq_idx)[0])
    return counts


def runs(labels: np.ndarray, seq_idx: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The answers of a row, int32 each, and for every predicted label (m,) which of them it is of.

    Args:
        labels: (T,), IGNORE_INDEX where there is none.
        seq_idx: (T,) the sample of each token. A label at the start of a sample is predicted by nothing.
    """
    predicted = np.flatnonzero((labels[1:] != IGNORE_INDEX) & (seq_idx[1:] == seq_idx[:-1])) + 1
    starts = np.flatnonzero(np.diff(predicted, prepend=-1) > 1)
    of = np.zeros(len(predicted), dtype=np.int64)
    of[starts] = 1
    return [part.astype(np.int32) for part in np.split(labels[predicted], starts)[1:]], np.cumsum(of) - 1


class AnswerWeights:
    """The weight of every token with a label.

    Args:
        counts: of the training split's answers, see `count_answers`.
        balance: 0 for equal weights, 1 so that every answer counts as much as any other, however often it is given.
    """

    def __init__(self, counts: Counter[bytes], balance: float):
        raw = {answer: count**-balance for answer, count in counts.items()}
        tokens = {answer: count * len(answer) for answer, count in counts.items()}
        scale = sum(tokens.values()) / sum(tokens[answer] * weight for answer, weight in raw.items())
        self._weights = {answer: weight * scale for answer, weight in raw.items()}

    def of(self, labels: np.ndarray, seq_idx: np.ndarray) -> np.ndarray:
        """Weights (m,) float32 of the labels of rows (b, T) that are predicted, row after row."""
        found = [np.zeros(0, dtype=np.float32)]
        for row, sequences in zip(labels, seq_idx, strict=True):
            answers, of = runs(row, sequences)
            own = np.array([self._weights[answer.tobytes()] for answer in answers], dtype=np.float32)
            found.append(own[of] if len(of) else found[0])
        return np.concatenate(found)

    def told(self) -> str:
        """For the log: how many answers there are, and between what their weights lie."""
        low, high = min(self._weights.values()), max(self._weights.values())
        return f"{len(self._weights):,} different answers weigh between {low:.2f} and {high:.2f} a token"
