"""COCO's captions and VQAv2's questions as sources: JSON objects of lists, whose entries name images by number.

The numbers and answers are held in memory (some 150 bytes for each image of COCO and answer of VQAv2); captions and
questions are read one by one.
"""

import io
from collections.abc import Iterator

from pipelines import storage
from pipelines.source_config import CocoCaptionsSource, Vqav2Source
from pipelines.sources.annotations import AnnotatedImages, JsonAnnotations
from pipelines.sources.entries import EntryError, captioned, check_path, question_and_answer, shown
from pipelines.sources.json_buffer import BrokenLine
from pipelines.sources.json_stream import read_member
from pipelines.sources.source import Listed, Record


class _Lists(JsonAnnotations):
    """A source whose entries stand in lists of JSON objects."""

    LIST = ""

    def records(self) -> Iterator[Record]:
        """List one record per entry of the list, in the file's order. Raises FileNotFoundError, ValueError, OSError."""
        for position, entry in enumerate(self._entries(self, self.LIST)):
            yield self._record(position, entry)

    cut, read = Listed.cut, Listed.read  # where the list begins is not known

    @staticmethod
    def _entries(file: AnnotatedImages, name: str) -> Iterator[object]:
        with file.open_text() as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
            yield from read_member(text, storage.shown(getattr(file.config, file.PATH_FIELD)), name)


class CocoCaptions(_Lists):
    """Reader of a `CocoCaptionsSource`."""

    LIST = "annotations"

    def __init__(self, config: CocoCaptionsSource):
        super().__init__(config)
        self._files: dict[object, object] | None = None

    def name(self, entry: dict) -> object:
        """Return the caption's number."""
        return entry.get("id")

    def parse(self, entry: dict, record_id: str) -> Record:
        """Turn a caption into its record. Raises EntryError."""
        if self._files is None:
            images = (image for image in self._entries(self, "images") if isinstance(image, dict))
            self._files = {_number(image.get("id")): image.get("file_name") for image in images}
        number = _number(entry.get("image_id"))
        if number not in self._files:
            raise EntryError(
                f"image_id is {shown(entry.get('image_id'))}, which `images` does not list", "image_missing"
            )
        path = self.relative(self._files[number])
        check_path("file_name", path)
        turns = captioned(entry.get("caption"), self.config.prompts, record_id, 1)
        return Record(record_id, self.config.label, [self.locate(path)], turns)


class _Answers(AnnotatedImages):
    """The file of VQAv2's answers."""


class Vqav2(_Lists):
    """Reader of a `Vqav2Source`."""

    PATH_FIELD, LIST = "questions", "questions"

    def __init__(self, config: Vqav2Source):
        super().__init__(config)
        self._answers_file = _Answers(config)
        self._answers: dict[object, tuple[object, object]] | None = None

    def name(self, entry: dict) -> object:
        """Return the question's number."""
        return entry.get("question_id")

    def parse(self, entry: dict, record_id: str) -> Record:
        """Turn a question and its answer into their record. Raises EntryError."""
        if self._answers is None:
            self._answers = {}
            for answer in self._entries(self._answers_file, "annotations"):
                if isinstance(answer, dict) and not isinstance(answer, BrokenLine):
                    found = answer.get("multiple_choice_answer"), answer.get("answer_type")
                    self._answers[_number(answer.get("question_id"))] = found
        question = _number(entry.get("question_id"))
        if question not in self._answers:
            raise EntryError(f"question {shown(question)} has no answer in `annotations`")
        answer, kind = self._answers[question]
        number = entry.get("image_id")
        if not isinstance(number, int) or isinstance(number, bool):
            raise EntryError(f"image_id is {shown(number)}, expected a number", "image_missing")
        path = self.config.image_name.format(image_id=number)
        check_path("image_name", path)
        turns = question_and_answer(entry.get("question"), answer, 1)
        kinds = [kind] if isinstance(kind, str) else None
        return Record(record_id, self.config.label, [self.locate(path)], turns, kinds)

    def fingerprint(self) -> str:
        """Digest of both files and of a zip's directory."""
        return super().fingerprint() + self._answers_file.fingerprint()


def _number(value: object) -> object:
    """A key for a number, or for what stands in its place."""
    return value if isinstance(value, int | str) else repr(value)
