"""Test questions from the recipe's sources: every question of a conversation stands alone, as a user would ask it."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter

from mlmamba.conversation import clean
from pipelines.packed import PackedDataset
from pipelines.source_config import SourceConfig
from pipelines.sources import open_source
from pipelines.sources.images import open_images
from pipelines.storage import write_atomic
from workflows.recipe.schema import Recipe

_SHOWN = 5  # records in an error


@dataclass(frozen=True)
class Image:
    """An image (or none, for text only) and the questions about it."""

    record_id: str
    source: int
    location: str | None
    ids: list[str]
    questions: list[str]
    answers: list[str]
    types: list[str]


def load_questions(sources: list[SourceConfig]) -> list[Image]:
    """All questions of the sources, grouped by image, in the sources' order.

    An id is the record's with the number of the question; of several sources, the source's name stands before it.

    Raises:
        ValueError: records have problems, or more than one image: a score must not leave items out silently.
    """
    images, problems = [], []
    for number, config in enumerate(sources):
        prefix = f"{config.label}/" if len(sources) > 1 else ""
        for record in open_source(config).records():
            if record.problem:
                problems.append(f"{record.id}: {record.problem.reason}: {record.problem.detail}")
                continue
            if len(record.images) > 1:
                problems.append(f"{record.id} has {len(record.images)} images; at most one is supported")
                continue
            questions = [turn.text for turn in record.turns if turn.role == "user"]
            answers = [turn.text for turn in record.turns if turn.role == "assistant"]
            if len(questions) != len(answers):
                problems.append(f"{record.id} has {len(questions)} questions and {len(answers)} answers")
                continue
            types = list(record.question_types or ["all"] * len(questions))
            ids = [f"{prefix}{record.id}/{i}" for i in range(len(questions))]
            location = record.images[0] if record.images else None
            images.append(Image(record.id, number, location, ids, questions, answers, types))
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{len(problems)} test records cannot be asked: {'; '.join(problems[:_SHOWN])}{more}")
    return images


def majority_answer(sources: list[SourceConfig]) -> str:
    """The most frequent answer in the training sources: what a model that learned nothing else would say."""
    counts = Counter(
        turn.text
        for config in sources
        for record in open_source(config).records()
        for turn in record.turns
        if turn.role == "assistant"
    )
    return counts.most_common(1)[0][0]


class Store(Protocol):
    """A place for images."""

    def read(self, location: str) -> bytes:
        """The encoded image. Raises OSError, ValueError."""


class SourceStore:
    """The images of one of the recipe's sources."""

    def __init__(self, config: dict):
        self._source = open_source(TypeAdapter(SourceConfig).validate_python(config))

    def read(self, location: str) -> bytes:
        """The image's file."""
        return self._source.read_image(location)


class ShardStore:
    """The images in the packed rows of a data set."""

    def __init__(self, uri: str, split: str):
        self._rows = PackedDataset(uri, split)

    def read(self, location: str) -> bytes:
        """Image of a location ROW/IMAGE."""
        row, image = location.split("/")
        return self._rows[int(row)].images[int(image)]


def open_store(description: dict) -> Store:
    """The store of a description; one process opens each once.

    Raises:
        ValueError: the description is of no kind that there is.
    """
    return _open(json.dumps(description, sort_keys=True))


@lru_cache(maxsize=8)
def _open(text: str) -> Store:
    description = json.loads(text)
    kind = description["kind"]
    if kind == "folder":
        return open_images(description["uri"])
    if kind == "source":
        return SourceStore(description["config"])
    if kind == "shards":
        return ShardStore(description["uri"], description["split"])
    raise ValueError(f"there is no kind of image store {kind!r}; expected folder, source or shards")


def sample_images(recipe: Recipe, images: list[Image], count: int) -> list[Image]:
    """Choose some of the images by the recipe's seed."""
    shown = [image for image in images if image.location is not None]
    return random.Random(recipe.seed).sample(shown, min(count, len(shown)))


def save_example(recipe: Recipe, images: list[Image], folder: Path) -> dict[str, str]:
    """Put one test image into a folder, for a person to ask about. Returns its `image` path and a `question`.

    Args:
        images: the recipe's test sources, as `load_questions` lists them.
    """
    image = sample_images(recipe, images, 1)[0]
    data = open_source(recipe.data.test[image.source]).read_image(image.location)
    file = folder / f"example{Path(image.location).suffix}"
    write_atomic(file, data)
    return {"image": str(file), "question": clean(image.questions[0])}
