"""VizWiz's val split (vizwiz.org, VQA): 4,319 questions that blind people asked about their own images.

    val.json                     [{image, question, answers: [{answer, answer_confidence}], answer_type, answerable}]
    val/VizWiz_val_00000000.jpg  images, in a folder or in val.zip

An entry has no id; its image's name is one. Unanswerability takes "unanswerable", after normalising, as the claim
that a question cannot be answered: average precision and F1 of that claim, as VizWiz's script computes them from
predictions of 0 and 1.
"""

import numpy as np

from workflows.evaluate.benchmarks.base import SHORT_ANSWER, Files, Item, Score
from workflows.evaluate.benchmarks.vqav2 import TenAnswers, most_frequent, normalise_vqa, vqa_score
from workflows.evaluate.statistics import average_precision, mean, precision_recall_f1

_UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'."
UNANSWERABLE = "unanswerable"


class VizWiz(TenAnswers):
    """Leave-one-out accuracy over ten people's answers, also of answerable and unanswerable ones; unanswerability."""

    name = "vizwiz"
    published = (4_319,)

    def read(self, data: str, images: str | None) -> list[Item]:
        files = Files(self.name, data)
        entries = files.json_lines("val.json", "Annotations/val.json", "annotations/val.json")
        folders = files.images(images, "val", "Images/val", "images/val", "images", "val.zip")
        self.digest = files.digest
        return self.place((self._item(entry) for entry in entries), folders)

    def score(self, item: Item, prediction: str, p_yes: float | None) -> Score:
        claimed = normalise_vqa(prediction) == UNANSWERABLE
        return Score(vqa_score(prediction, item.answers), text_yes=float(claimed))

    @classmethod
    def measure(cls, table: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        answerable = table["answerable"] > 0
        positive, claimed = 1.0 - table["answerable"], table["text_yes"]
        precision, recall, f1 = precision_recall_f1(positive, claimed, weights)
        return super().measure(table, weights) | {
            "answerable_only": mean(table["score"][answerable], weights[answerable]),
            "unanswerable_only": mean(table["score"][~answerable], weights[~answerable]),
            "unanswerability/ap": average_precision(positive, claimed, weights),
            "unanswerability/f1": f1,
            "unanswerability/precision": precision,
            "unanswerability/recall": recall,
        }

    def _item(self, entry: dict) -> tuple[Item, str]:
        image = self.need(entry, "image", str, "an entry")
        question, kind = (self.need(entry, key, str, image) for key in ("question", "answer_type"))
        answerable = int(self.need(entry, "answerable", int, image))
        answers = self.people(entry.get("answers"), image)
        prompt = f"{question}\n{_UNSURE}\n{SHORT_ANSWER}"
        details = {"answerable": answerable}
        return Item(image, question, prompt, answers, most_frequent(answers), kind, details=details), image
