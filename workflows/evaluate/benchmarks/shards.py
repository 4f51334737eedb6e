"""A prepared data set of this project as a benchmark: the questions and answers in its packed rows.

The rows hold token ids in the prompt format of mlmamba/conversation.py: runs without labels are what the user said,
runs with labels the answers, each with the end token that closes it.
"""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from tokenizers import Tokenizer

from mlmamba.conversation import ASSISTANT, IGNORE_INDEX, IMAGE_TOKEN, USER
from pipelines import storage
from pipelines.manifest import TOKENIZER_PATH, Manifest
from pipelines.packed import PackedDataset, PackedRow
from workflows.errors import UsageError
from workflows.evaluate.benchmarks.base import Item
from workflows.evaluate.benchmarks.files import absolute
from workflows.evaluate.benchmarks.own_data import OwnData


class Shards(OwnData):
    """Every question of the data set's samples, asked alone. Types are the samples' sources."""

    name = "shards"
    splits = ("validation", "train")

    def read(self, data: str, images: str | None) -> list[Item]:
        try:
            manifest = Manifest.load(data)
            rows = PackedDataset(data, self.split)
            self._tokenizer = Tokenizer.from_buffer(storage.read_bytes(storage.join(data, TOKENIZER_PATH)))
        except (ValueError, OSError) as error:
            raise UsageError(f"{self.name}: {error}") from error
        self._image = self._tokenizer.token_to_id(IMAGE_TOKEN)
        self._several = len(manifest.splits[self.split].samples_by_source) > 1
        self.stores = [{"kind": "shards", "uri": absolute(data), "split": self.split}]
        self.digest = manifest.digest[:10]
        return [item for number in range(len(rows)) for item in self._row(number, rows[number])]

    def _row(self, number: int, row: PackedRow) -> Iterator[Item]:
        owner = row.seq_idx[row.image_positions]
        for sample, record_id in enumerate(row.sample_ids):
            shown = np.flatnonzero(owner == sample)
            location = f"{number}/{shown[0]}" if len(shown) else None
            source = row.source[sample]
            prefix = f"{source}/{record_id}" if self._several else record_id
            where = row.seq_idx == sample
            pairs = self._pairs(row.input_ids[where], row.labels[where])
            for turn, (question, answer) in enumerate(pairs):
                key = f"{prefix}/{turn}"
                if len(shown) > 1:
                    self.missing[key] = f"the sample has {len(shown)} pictures; at most one is supported"
                yield Item(key, question, question, [answer], answer, source, location)

    def _pairs(self, ids: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, str]]:
        """Questions and answers of one sample."""
        runs = [
            (answer, [int(ids[i]) for i in indices if ids[i] != self._image])
            for answer, indices in groupby(range(len(ids)), key=lambda i: labels[i] != IGNORE_INDEX)
        ]
        for (_, asked), (_, said) in zip(runs[::2], runs[1::2], strict=False):
            end = self._text(said[-1:])
            question = self._text(asked).lstrip("\n").removeprefix(f"{USER}\n").removesuffix(f"{end}\n{ASSISTANT}\n")
            yield question, self._text(said[:-1])

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
