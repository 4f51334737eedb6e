"""Samples of a data set for people to look at: a varied choice, decoded, with what has loss told apart."""

import re
from dataclasses import dataclass
from itertools import groupby, zip_longest

import numpy as np
from tokenizers import Tokenizer

from mlmamba.conversation import IGNORE_INDEX
from pipelines import storage
from pipelines.manifest import TOKENIZER_PATH
from pipelines.packed import PackedDataset, PackedRow
from pipelines.shuffle import permutation

_ROWS = 100  # rows that the choice is made from
PLAIN, LOSS, PICTURE, WRONG = "plain", "loss", "picture", "wrong"


@dataclass(frozen=True)
class Sample:
    """One sample as it lies in its row."""

    id: str
    source: str
    row: int
    tokens: int
    loss_tokens: int
    images: list[bytes]
    """Encoded pictures."""
    pieces: list[tuple[str, str]]
    """(text, kind) in reading order. Kinds: LOSS where the model learns to write the text, PLAIN where it only reads
    it, PICTURE for a picture's tokens, and WRONG for what should not be: a label that differs from its token, or a
    picture with too many or too few tokens."""


def choose(uri: str, split: str, count: int, seed: int) -> list[Sample]:
    """Up to `count` samples of a split, of every source and with no, one and several pictures as far as there are.

    Raises:
        FileNotFoundError, ValueError: as PackedDataset.
    """
    dataset = PackedDataset(uri, split)
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for index in permutation(len(dataset), seed, "sheet")[:_ROWS].tolist():
        row = dataset[index]
        owners = row.seq_idx[row.image_positions]
        for place, source in enumerate(row.source):
            kind = source, min(int((owners == place).sum()), 2)
            groups.setdefault(kind, []).append((index, place))
    # Shuffled, or the samples would all be of the first rows: a row can hold dozens.
    queues = [[group[i] for i in permutation(len(group), seed, "group")] for _, group in sorted(groups.items())]
    turns = [place for one_of_each in zip_longest(*queues) for place in one_of_each if place is not None]
    chosen = turns[:count]
    tokenizer = Tokenizer.from_buffer(storage.read_bytes(storage.join(uri, TOKENIZER_PATH)))
    size = dataset.manifest.tokens_per_image
    return [sample_of(dataset[index], index, place, tokenizer, size) for index, place in chosen]


def sample_of(row: PackedRow, index: int, place: int, tokenizer: Tokenizer, tokens_per_image: int) -> Sample:
    """Decode the sample at `place` of row number `index`."""
    here = np.flatnonzero(row.seq_idx == place)
    ids, labels = row.input_ids[here], row.labels[here]
    own = np.flatnonzero(row.seq_idx[row.image_positions] == place)
    starts = row.image_positions[own] - here[0]
    kinds = np.where(labels == IGNORE_INDEX, PLAIN, np.where(labels == ids, LOSS, WRONG)).astype(object)
    texts: dict[int, tuple[str, str]] = {}
    for number, start in enumerate(starts, 1):
        after = np.flatnonzero(ids[start:] != ids[start])
        limit = starts[number] - start if number < len(starts) else len(ids)
        found = min(int(after[0]) if len(after) else len(ids) - start, int(limit))
        right = found == tokens_per_image and (kinds[start : start + found] == PLAIN).all()
        name = f"<image {number} x {found}>" if len(starts) > 1 else f"<image x {found}>"
        texts[int(start)] = name.replace(" ", "\u00a0"), PICTURE if right else WRONG
        kinds[start : start + found] = f"picture {start}"
    pieces, at = [], 0
    for kind, group in groupby(kinds):
        length = len(list(group))
        decoded = tokenizer.decode(ids[at : at + length].tolist(), skip_special_tokens=False)
        pieces.append(texts[at] if re.match("picture ", kind) else (decoded, kind))
        at += length
    return Sample(
        row.sample_ids[place],
        row.source[place],
        index,
        len(ids),
        int((labels != IGNORE_INDEX).sum()),
        [row.images[i] for i in own],
        pieces,
    )
