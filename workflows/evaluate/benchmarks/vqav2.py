"""VQAv2's val split (visualqa.org): 214,354 questions about 40,504 pictures of COCO.

v2_OpenEnded_mscoco_val2014_questions.json   {"info", "data_subtype", "questions": [{question_id, image_id, question}]}
v2_mscoco_val2014_annotations.json           {"annotations": [{question_id, answer_type, answers: [{answer}]}]}
val2014/COCO_val2014_000000000042.jpg        pictures, in a folder or in val2014.zip
"""

import numpy as np

from workflows.errors import UsageError
from workflows.evaluate.benchmarks.base import SHORT_ANSWER, Item, Score
from workflows.evaluate.benchmarks.files import Files
from workflows.evaluate.benchmarks.ten_answers import TenAnswers
from workflows.evaluate.metrics import mean
from workflows.evaluate.vqa_rules import most_frequent, script_score, vqa_score

_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


class VQAv2(TenAnswers):
    """Leave-one-out accuracy over ten people's answers, by answer type; "script" is the published script's figure."""

    name = "vqav2"
    published = (214_354,)

    def read(self, data: str, images: str | None) -> list[Item]:
        files = Files(self.name, data)
        head = files.object(_QUESTIONS, files.json(_QUESTIONS, f"Questions/{_QUESTIONS}"))
        version = str((head.get("info") or {}).get("version", "2.0"))
        if not version.startswith("2"):
            raise UsageError(f"{self.name}: the questions are of version {version}, expected 2.0")
        body = files.object(_ANNOTATIONS, files.json(_ANNOTATIONS, f"Annotations/{_ANNOTATIONS}"))
        questions = self._by_id(self.need(head, "questions", list, "the questions file"))
        annotations = self._by_id(self.need(body, "annotations", list, "the annotations file"))
        self.match(dict(questions), dict(annotations))
        answered = dict(annotations)
        subset = str(head.get("data_subtype", "val2014"))
        places = [f"{place}{subset}" for place in ("", "images/", "Images/", "Images/mscoco/")]
        folders = files.pictures(images, *places, f"{subset}.zip")
        self.digest = files.digest
        return self.place((self._item(key, entry, answered[key], subset) for key, entry in questions), folders)

    def score(self, item: Item, prediction: str, p_yes: float | None) -> Score:
        return Score(vqa_score(prediction, item.answers), script_score(prediction, item.answers))

    @classmethod
    def measure(cls, table: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        return super().measure(table, weights) | {"script": mean(table["text_score"], weights)}

    def _by_id(self, entries: list) -> list[tuple[str, dict]]:
        return [(str(self.need(entry, "question_id", int, "an entry")), entry) for entry in entries]

    def _item(self, key: str, entry: dict, annotation: dict, subset: str) -> tuple[Item, str]:
        question = self.need(entry, "question", str, f"question {key}")
        picture = self.need(entry, "image_id", int, f"question {key}")
        answers = self.people(annotation.get("answers"), key)
        kind = self.need(annotation, "answer_type", str, f"annotation {key}")
        item = Item(key, question, f"{question}\n{SHORT_ANSWER}", answers, most_frequent(answers), kind)
        return item, f"COCO_{subset}_{picture:012d}.jpg"
