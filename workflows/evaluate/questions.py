"""Test questions from the recipe's sources: every question of a conversation stands alone, as a user would ask it."""

from collections import Counter
from dataclasses import dataclass

from pipelines.config import SourceConfig
from pipelines.sources import open_source

_SHOWN = 5  # records in an error


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

    An id is the record's with the number of the question; of several sources, the source's name stands before it.

    Raises:
        ValueError: records have problems, or more than one picture: a score must not leave items out silently.
    """
    pictures, problems = [], []
    for number, config in enumerate(sources):
        prefix = f"{config.label}/" if len(sources) > 1 else ""
        for record in open_source(config).records():
            if record.problem:
                problems.append(f"{record.id}: {record.problem.reason}: {record.problem.detail}")
                continue
            if len(record.images) > 1:
                problems.append(f"{record.id} has {len(record.images)} pictures; at most one is supported")
                continue
            questions = [turn.text for turn in record.turns if turn.role == "user"]
            answers = [turn.text for turn in record.turns if turn.role == "assistant"]
            if len(questions) != len(answers):
                problems.append(f"{record.id} has {len(questions)} questions and {len(answers)} answers")
                continue
            types = list(record.question_types or ["all"] * len(questions))
            ids = [f"{prefix}{record.id}/{i}" for i in range(len(questions))]
            location = record.images[0] if record.images else None
            pictures.append(Picture(record.id, number, location, ids, questions, answers, types))
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{len(problems)} test records cannot be asked: {'; '.join(problems[:_SHOWN])}{more}")
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
