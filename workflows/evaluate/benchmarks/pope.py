"""POPE (Li et al. 2023): is there an object in the picture? Three splits of about 3,000 questions on COCO's val2014.

    coco_pope_SPLIT.json                   random, popular and adversarial; one {question_id, image, text, label} a line
    val2014/COCO_val2014_000000310196.jpg  pictures, in a folder or in val2014.zip

The prompt, and accuracy by the first token's probability of Yes and No as the mean over the splits, are those of
TRI-ML/vlm-evaluation, which the ML-Mamba paper's code forks. F1 from the generated text is POPE's own figure, and
LLaVA's: text is read by POPE's rule (first sentence, "No", "not" or "no" among its words means no, anything else yes).
lmms-eval counts an answer that is neither "yes" nor "no" as wrong, and its yes_ratio is that of the labels.
The random split was published with 2,910 questions first (which LLaVA's figures are of), with 3,000 later.
"""

from workflows.errors import UsageError
from workflows.evaluate.benchmarks.base import SHORT_ANSWER, Item
from workflows.evaluate.benchmarks.files import Files
from workflows.evaluate.benchmarks.yes_no import YesNo

SPLITS = ("random", "popular", "adversarial")


class POPE(YesNo):
    """Accuracy and F1 of each split and their mean; types are the splits."""

    name = "pope"
    choices = ("Yes", "No")
    published = (8_910, 9_000)

    def read(self, data: str, images: str | None) -> list[Item]:
        files = Files(self.name, data)
        pairs = []
        for split in SPLITS:
            file = f"coco_pope_{split}.json"
            entries = files.json_lines(file, f"coco/{file}", f"output/coco/{file}")
            pairs += [self._item(split, file, entry) for entry in entries]
        folders = files.pictures(images, "val2014", "images", "coco/val2014", "val2014.zip")
        self.digest = files.digest
        return self.place(pairs, folders)

    def said(self, text: str) -> float:
        words = text.split(".")[0].replace(",", "").split(" ")
        return 0.0 if {"No", "not", "no"} & set(words) else 1.0

    def majority(self) -> str:
        return "Yes"

    def _item(self, split: str, file: str, entry: dict) -> tuple[Item, str]:
        number = self.need(entry, "question_id", (int, str), file)
        where = f"{file} {number}"
        question, picture, label = (self.need(entry, key, str, where) for key in ("text", "image", "label"))
        if label not in ("yes", "no"):
            raise UsageError(f"{self.name}: {where} has the label {label!r}, expected yes or no")
        details = {"positive": int(label == "yes")}
        prompt = f"{question}\n{SHORT_ANSWER}"
        return Item(f"{split}/{number}", question, prompt, [label], label, split, details=details), picture
