"""Which samples share a row: best-fit decreasing in bounded windows, on plain numbers only.

Samples are shuffled and taken a window at a time. Of a window, the longest ones, which hold a share of its tokens, are
first spread over the rows, each into the emptiest; then the others fill the rows up, longest first, each into the
fullest row that still has room. The emptiest rows stay open for the next window. Of three shares, the one that needs
the fewest rows is taken.

Best-fit alone (a share of none) puts samples of one length side by side when many fit into a row. On easy-vqa at 1,024
tokens it fills 97.4 % and lengths within a row vary 0.39 times as much as in the corpus; with the spread it is 97.2 %
and 0.75. On lengths like LLaVA's (729 tokens an image, rows of 4,096) it is 94 % and 0.65 against 98 % and 1.15.
"""

import math
from bisect import bisect_left, insort

import numpy as np

from pipelines.shuffle import permutation

WINDOW = 4096  # samples sorted at a time
OPEN_ROWS = 256  # rows left open for the next window
SPREADS = (0.5, 0.4, 0.3)  # shares of a window's tokens, longest samples first, to spread over the rows


def plan_rows(
    lengths: np.ndarray,
    max_tokens: int,
    seed: int = 0,
    window: int = WINDOW,
    open_rows: int = OPEN_ROWS,
    order: np.ndarray | None = None,
    part: int = 0,
) -> list[np.ndarray]:
    """Assign every sample to exactly one row.

    Args:
        lengths: tokens of each sample, shape (samples,).
        max_tokens: most tokens in a row.
        seed: decides which samples can meet, their order within a row, and the order of the rows.
        window: see the module's text.
        open_rows: see the module's text.
        order: the shuffled order of the samples, where they are a part of a larger set.
        part: which one.

    Returns:
        Sample indices of each row, rows in shuffled order. The same arguments give the same plan everywhere.

    Raises:
        ValueError: a sample is empty or longer than a row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    bad = np.flatnonzero((lengths < 1) | (lengths > max_tokens))
    if bad.size:
        raise ValueError(f"sample {bad[0]} has {lengths[bad[0]]} tokens, expected 1 to {max_tokens}")
    if order is None:
        order = permutation(len(lengths), seed, "samples")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))

    blocks = []
    for start in range(0, len(order), window):
        block = order[start : start + window]
        blocks.append(block[np.argsort(-lengths[block], kind="stable")])
    rows = min((_plan(blocks, lengths, max_tokens, open_rows, spread) for spread in SPREADS), key=len)
    # Longest first was for packing; within a row the shuffled order holds, so that length says nothing about place.
    plan = [np.array(sorted(row, key=rank.__getitem__), dtype=np.int64) for row in rows]
    return [plan[i] for i in permutation(len(plan), seed, "rows", *([part] if part else []))]


def _plan(
    blocks: list[np.ndarray], lengths: np.ndarray, max_tokens: int, open_rows: int, spread: float
) -> list[list[int]]:
    """The rows, as lists of samples, of windows whose samples are given longest first."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for block in blocks:
        _fill(rows, room, block, lengths, max_tokens, spread)
        room = room[-open_rows:]
    return [row for row in rows if row]


def _fill(rows: list, room: list, samples: np.ndarray, lengths: np.ndarray, max_tokens: int, spread: float) -> None:
    """Put one window's samples, longest first, into rows, opening as many as their tokens need."""
    total = int(lengths[samples].sum())

    def open_row() -> tuple[int, int]:
        rows.append([])
        return max_tokens, len(rows) - 1

    for _ in range(math.ceil((total - sum(free for free, _ in room)) / max_tokens)):
        insort(room, open_row())
    placed = 0
    for sample in samples.tolist():
        length = int(lengths[sample])
        fullest = bisect_left(room, (length, -1))
        if fullest == len(room):
            free, row = open_row()
        else:
            free, row = room.pop(-1 if placed < spread * total else fullest)
        rows[row].append(sample)
        placed += length
        if free > length:
            insort(room, (free - length, row))
