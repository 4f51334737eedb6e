"""POPE, and what it shares with VSR: benchmarks whose every answer is one of two words.

POPE (Li et al. 2023): is there an object in the image? Three splits of about 3,000 questions on COCO's val2014.

    coco_pope_SPLIT.json                   random, popular and adversarial; one {question_id, image, text, label} a line
    val2014/COCO_val2014_000000310196.jpg  images, in a folder or in val2014.zip

The prompt, and accuracy by the first token's probability of Yes and No as the mean over the splits, are those of
TRI-ML/vlm-evaluation, which the ML-Mamba paper's code forks. F1 from the generated text is POPE's own figure, and
LLaVA's: text is read by POPE's rule (first sentence, "No", "not" or "no" among its words means no, anything else yes).
lmms-eval counts an answer that is neither "yes" nor "no" as wrong, and its yes_ratio is that of the labels.
The random split was published with 2,910 questions first (which LLaVA's figures are of), with 3,000 later.
"""

import numpy as np

from workflows.errors import UsageError
from workflows.evaluate.benchmarks.base import SHORT_ANSWER, Benchmark, Files, Item, Score
from workflows.evaluate.results import OVERALL
from workflows.evaluate.statistics import average_precision, mean, precision_recall_f1, roc_auc

SPLITS = ("random", "popular", "adversarial")


class YesNo(Benchmark):
    """A benchmark of yes/no questions: accuracy, precision, recall, F1 and share of positive answers.

    Each score is reported for each type of question and as the mean over types.

    By probability: the positive choice if its token is at least as probable as the other's, as first token of the
    answer; also the areas under ROC and precision-recall. By text (names that begin with text/): what `said` reads.
    """

    def said(self, text: str) -> float | None:
        """What a generated answer says: 1 the positive choice, 0 the other, None neither."""
        raise NotImplementedError

    def score(self, item: Item, prediction: str, p_yes: float | None) -> Score:
        positive = item.details["positive"]
        text = self.said(prediction)
        by_text = 0.0 if text is None else float(text == positive)
        if p_yes is None:
            return Score(by_text, by_text, text)
        return Score(float((p_yes >= 0.5) == bool(positive)), by_text, text)

    @classmethod
    def measure(cls, table: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        kinds = [str(kind) for kind in np.unique(table["type"])]
        by_kind = {kind: cls._of(table, weights * (table["type"] == kind)) for kind in kinds}
        names = next(iter(by_kind.values()))
        scores = {name: float(np.mean([one[name] for one in by_kind.values()])) for name in names}
        for kind, one in by_kind.items():
            scores[kind], scores[f"text/{kind}"] = one[OVERALL], one[f"text/{OVERALL}"]
            scores |= {f"{name}/{kind}": value for name, value in one.items() if not name.endswith(OVERALL)}
        return scores

    @staticmethod
    def _of(table: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        positive, p_yes = table["positive"], table["p_yes"]
        scores = {OVERALL: mean(table["score"], weights), f"text/{OVERALL}": mean(table["text_score"], weights)}
        text = np.nan_to_num(table["text_yes"])  # neither is not the positive choice
        sides = {"text/": text}
        if not np.isnan(p_yes).any():
            sides[""] = (p_yes >= 0.5).astype(float)
            scores["roc_auc"] = roc_auc(positive, p_yes, weights)
            scores["pr_auc"] = average_precision(positive, p_yes, weights)
        for prefix, claimed in sides.items():
            precision, recall, f1 = precision_recall_f1(positive, claimed, weights)
            scores |= {f"{prefix}precision": precision, f"{prefix}recall": recall, f"{prefix}f1": f1}
            scores[f"{prefix}yes_rate"] = mean(claimed, weights)
        scores["text/unclear"] = mean(np.isnan(table["text_yes"]).astype(float), weights)
        return scores


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
        folders = files.images(images, "val2014", "images", "coco/val2014", "val2014.zip")
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
        question, image, label = (self.need(entry, key, str, where) for key in ("text", "image", "label"))
        if label not in ("yes", "no"):
            raise UsageError(f"{self.name}: {where} has the label {label!r}, expected yes or no")
        details = {"positive": int(label == "yes")}
        prompt = f"{question}\n{SHORT_ANSWER}"
        return Item(f"{split}/{number}", question, prompt, [label], label, split, details=details), image
