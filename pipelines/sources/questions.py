"""One question about one picture per JSON entry, as LRV-Instruct and most VQA sets are published."""

from pipelines.sources.annotations import JsonAnnotations
from pipelines.sources.base import Record
from pipelines.sources.entries import EntryError, check_path, question_and_answer


class Questions(JsonAnnotations):
    """Reader of a `QuestionsSource`."""

    def name(self, entry: dict) -> object:
        """The entry's id, or its picture's name."""
        return entry.get(self.config.id or self.config.image)

    def parse(self, entry: dict, record_id: str) -> Record:
        """The record of an entry. Raises EntryError."""
        image, images = entry.get(self.config.image), []
        if image is not None:
            path = f"{image}{self.config.image_suffix}" if isinstance(image, str | int) else image
            check_path(self.config.image, path)
            images = [path]
        turns = question_and_answer(entry.get(self.config.question), entry.get(self.config.answer), len(images))
        kinds = None
        if self.config.question_type is not None:
            kind = entry.get(self.config.question_type)
            if not isinstance(kind, str):
                raise EntryError(f"{self.config.question_type} is {kind!r}, expected a string")
            kinds = [kind]
        return Record(record_id, self.config.label, [self.locate(path) for path in images], turns, kinds)
