"""Benchmarks on a user's own data, where each question has one answer, scored by exact match.

llava     a file in LLaVA's format, or a folder with one
recipe    the test sources of a recipe (`data.test`)
shards    a split of a prepared data set
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import get_args

import numpy as np
from tokenizers import Tokenizer

from mlmamba.conversation import IGNORE_INDEX, IMAGE_TOKEN, clean
from pipelines import storage
from pipelines.identity import digest
from pipelines.manifest import TOKENIZER_PATH, Manifest
from pipelines.packed import PackedDataset, PackedRow
from pipelines.source_config import LlavaSource, SourceConfig
from pipelines.sources import open_source
from pipelines.tokenizer import chat_format
from workflows.errors import UsageError, WorkflowError
from workflows.evaluate.benchmarks.base import Benchmark, ImageFolder, Item, Score, absolute, normalise
from workflows.evaluate.questions import Image, load_questions, majority_answer
from workflows.recipe.evaluate import BenchmarkRecipe
from workflows.recipe.schema import Recipe

_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


class OwnData(Benchmark):
    """Share of exact answers (without case, outer space and a last full stop), overall and by type of question."""

    twice = "give every record an id of its own, or, in a recipe, the source `repeated_ids: number`"

    def score(self, item: Item, prediction: str, p_yes: float | None) -> Score:
        return Score(float(normalise(prediction) == normalise(item.answer)))

    def from_sources(self, sources: list[SourceConfig]) -> list[Item]:
        """The questions of some sources, listed once: `listed` has them by image for whoever needs them again.

        Images that are known not to be there go to `missing`.

        Raises:
            WorkflowError: a record cannot be asked.
        """
        self.stores = [{"kind": "source", "config": config.absolute().model_dump(mode="json")} for config in sources]
        try:
            images = load_questions(sources)
            readers = [open_source(config) for config in sources]
            self.digest = digest([[config.reader_fields() for config in sources], [r.fingerprint() for r in readers]])
        except (ValueError, OSError) as error:
            raise WorkflowError(str(error)) from error
        self.missing |= _not_there(sources, images)
        self.listed = images
        return [
            Item(key, clean(question), question, [answer], answer, kind, image.location, image.source)
            for image in images
            for key, question, answer, kind in zip(image.ids, image.questions, image.answers, image.types, strict=True)
        ]


def _not_there(sources: list[SourceConfig], images: Iterable[Image]) -> dict[str, str]:
    """Questions whose image's file is not in its source's folder. A zip's members are checked when it is listed."""
    roots = [getattr(config, "images", None) for config in sources]
    folders = [ImageFolder(root) if root and not root.endswith(".zip") else None for root in roots]
    return {
        key: f"there is no image {image.location}"
        for image in images
        if image.location is not None
        and (folder := folders[image.source]) is not None
        and folder.locate(image.location) is None
        for key in image.ids
    }


class Llava(OwnData):
    """Every question of every conversation, asked alone. `data` is the file, or a folder with one such file."""

    name = "llava"

    def read(self, data: str, images: str | None) -> list[Item]:
        file, folder = self._find(data)
        return self.from_sources([LlavaSource(type="llava", annotations=file, images=images or folder)])

    def _find(self, data: str) -> tuple[str, str]:
        """The annotations and the folder they are in."""
        if storage.size(data) is not None:
            base, mark, query = data.partition("?") if "://" in data else (data, "", "")
            return data, (base.rpartition("/")[0] or ".") + mark + query
        names = [name for name in storage.list_names(data) if name.endswith(_ENDINGS)]
        if len(names) != 1:
            one = storage.shown(storage.join(data, names[0])) if names else ""
            found = f"several ({', '.join(names)}): name one of them, as in --data {one}" if names else "none"
            raise UsageError(f"{self.name}: {storage.shown(data)} should hold one .json or .jsonl file, found {found}")
        return storage.join(data, names[0]), data


class TestSources(OwnData):
    """`data.test` of a recipe. The majority answer is that of its training sources.

    Raises:
        WorkflowError: there are no test sources, or a record cannot be asked.
    """

    __test__ = False  # not a test of pytest's, whatever its name
    name = "recipe"
    taken = get_args(BenchmarkRecipe.model_fields["name"].annotation)  # a gate finds their scores beside these

    def __init__(self, recipe: Recipe):
        if not recipe.data.test:
            raise WorkflowError(f"recipe {recipe.name} has no data.test sources to evaluate on")
        self._recipe = recipe
        self.max_new_tokens = recipe.evaluate.max_new_tokens
        super().__init__(recipe.name)

    @property
    def title(self) -> str:
        return self._recipe.name

    def read(self, data: str, images: str | None) -> list[Item]:
        return self.from_sources(self._recipe.data.test)

    def majority(self) -> str:
        return majority_answer(self._recipe.data.train)


class Shards(OwnData):
    """Every question of the data set's samples, asked alone. Types are the samples' sources."""

    name = "shards"
    splits = ("validation", "train")

    def read(self, data: str, images: str | None) -> list[Item]:
        try:
            manifest = Manifest.load(data)
            rows = PackedDataset(data, self.split)
            self._tokenizer = Tokenizer.from_buffer(storage.read_bytes(storage.join(data, TOKENIZER_PATH)))
            self._chat = chat_format(storage.join(data, "tokenizer"))
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
                    self.missing[key] = f"the sample has {len(shown)} images; at most one is supported"
                yield Item(key, question, question, [answer], answer, source, location)

    def _pairs(self, ids: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, str]]:
        """Questions and answers of one sample."""
        runs = [
            (answer, [int(ids[i]) for i in indices if ids[i] != self._image])
            for answer, indices in groupby(range(len(ids)), key=lambda i: labels[i] != IGNORE_INDEX)
        ]
        for (_, asked), (_, said) in zip(runs[::2], runs[1::2], strict=False):
            end = self._text(said[-1:])
            question = self._text(asked).lstrip("\n").removesuffix(f"{end}\n{self._chat.assistant}")
            if self._chat.system is not None and question.startswith(self._chat.system):
                question = question.removeprefix(self._chat.system).replace(f"{end}\n{self._chat.user}", "\n\n", 1)
            yield question.removeprefix(self._chat.user), self._text(said[:-1])

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
