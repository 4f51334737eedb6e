"""The example that is stored with a version: a test picture, a question and the answer that the evaluation got."""

import json
from dataclasses import dataclass
from pathlib import Path

_FILE, _PICTURE = "example.json", "picture"


@dataclass(frozen=True)
class Example:
    """One question about one picture. Serving asks it before it takes a version."""

    picture: bytes
    """Encoded."""
    question: str
    answer: str
    max_tokens: int
    """Longest answer that the evaluation allowed."""

    def save(self, folder: Path) -> None:
        """Write it to a new folder."""
        folder.mkdir(parents=True)
        (folder / _PICTURE).write_bytes(self.picture)
        content = {"question": self.question, "answer": self.answer, "max_tokens": self.max_tokens}
        (folder / _FILE).write_text(json.dumps(content, indent=2))

    @classmethod
    def load(cls, folder: Path) -> "Example":
        """What `save` wrote. Raises OSError, ValueError, TypeError or KeyError."""
        content = json.loads((folder / _FILE).read_text())
        picture = (folder / _PICTURE).read_bytes()
        return cls(picture, str(content["question"]), str(content["answer"]), int(content["max_tokens"]))


def choose_example(evaluation: Path, max_tokens: int) -> Example | None:
    """The first item of a finished evaluation that has a picture which can be read and an answer; None without any.

    Args:
        evaluation: its folder.
        max_tokens: longest answer that it allowed.
    """
    from workflows.evaluate.results import read_answers, read_picture, read_scores

    scores = read_scores(evaluation)
    for row in read_answers(evaluation):
        if not row.prediction:
            continue
        try:
            picture = read_picture(scores, row)
        except (OSError, ValueError):
            continue
        if picture is not None:
            return Example(picture, row.prompt or row.question, row.prediction, max_tokens)
    return None
