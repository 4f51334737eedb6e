"""Test questions from the recipe's sources: every question of a conversation stands alone, as a user would ask it."""

from collections import Counter
from dataclasses import dataclass

from pipelines.config import SourceConfig
from pipelines.sources import open_source


@dataclass(frozen=True)
class Picture:
    """A picture (or none, for text only) and the questions about it."""

    record_id: str
    source: int
    location: str | None
    ids: list[str]
    questions: list[str]
    answers: list[str]
    types: list[str]


def load_questions(sources: list[SourceConfig]) -> list[Picture]:
    """All questions of the sources, grouped by picture, in the sources' order.

    Raises:
        ValueError: a record has a problem, or more than one picture: a score must not leave items out silently.
    """
    pictures = []
    for number, config in enumerate(sources):
        for record in open_source(config).records():
            if record.problem:
                raise ValueError(f"test record {record.id}: {record.problem.reason}: {record.problem.detail}")
            if len(record.images) > 1:
                raise ValueError(f"test record {record.id} has {len(record.images)} pictures; at most one is supported")
            questions = [turn.text for turn in record.turns if turn.role == "user"]
            answers = [turn.text for turn in record.turns if turn.role == "assistant"]
            types = list(record.question_types or ["all"] * len(questions))
            ids = [f"{record.id}/{i}" for i in range(len(questions))]
            location = record.images[0] if record.images else None
            pictures.append(Picture(record.id, number, location, ids, questions, answers, types))
    return pictures


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
