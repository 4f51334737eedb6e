"""What VQAv2, VizWiz and TextVQA share: ten people's answers, and questions and answers in separate places."""

from collections.abc import Mapping

from workflows.errors import WorkflowError
from workflows.evaluate.benchmarks.base import Benchmark, ids_text

PEOPLE = 10


class TenAnswers(Benchmark):
    """A benchmark whose questions were answered by ten people each."""

    def people(self, answers: object, item_id: str) -> list[str]:
        """The ten answers, which are strings or {"answer": ...} objects.

        Raises:
            WorkflowError: there are not ten of them.
        """
        entries = answers if isinstance(answers, list) else []
        texts = [entry.get("answer") if isinstance(entry, dict) else entry for entry in entries]
        if len(texts) != PEOPLE or not all(isinstance(text, str) for text in texts):
            raise WorkflowError(
                f"{self.name}: question {item_id} has {len(texts)} answers, expected {PEOPLE}: the scores leave one "
                "person out of ten. Is the file of another version, or of a split without answers?"
            )
        return texts

    def match(self, questions: Mapping[str, object], annotations: Mapping[str, object]) -> None:
        """Raise WorkflowError unless questions and annotations have the same ids."""
        without = [key for key in questions if key not in annotations]
        unknown = [key for key in annotations if key not in questions]
        if without or unknown:
            raise WorkflowError(
                f"{self.name}: the files do not belong together: {ids_text(without, 'questions')} have no answers, "
                f"{ids_text(unknown, 'annotations')} are of unknown questions"
            )
