"""TextVQA's val split, version 0.5.1 (textvqa.org): 5,000 questions about 3,166 images with text in them.

    TextVQA_0.5.1_val.json             {"dataset_version", "data": [{question_id, image_id, question, answers}]}
    TextVQA_Rosetta_OCR_v0.2_val.json  {"data": [{image_id, ocr_info: [{word}]}]}, the tokens that OCR read; or
    llava_textvqa_val_v051_ocr.jsonl   LLaVA's: question_id is the image's, the text has "Reference OCR token: A, B"
    train_images/IMAGE_ID.jpg          images, in a folder or in train_val_images.zip

Every question is asked twice, with the OCR tokens (ocr) and without (pure). The tokens stand before the question: after
it they cost a recurrent model 15 points (Cobra, table 7). The published figure and our "overall" is the one with them.
"""

import numpy as np

from workflows.errors import UsageError
from workflows.evaluate.benchmarks.base import SHORT_ANSWER, Files, Item, Score
from workflows.evaluate.benchmarks.vqav2 import TenAnswers, m4c_score, most_frequent
from workflows.evaluate.results import OVERALL
from workflows.evaluate.statistics import means_by_type

_QUESTIONS = "TextVQA_0.5.1_val.json"
_VERSION = "0.5.1"
_ROSETTA = "TextVQA_Rosetta_OCR_v0.2_val.json"
_LLAVA = "llava_textvqa_val_v051_ocr.jsonl"
_OCR = "Reference OCR token: "
VARIANTS = ("ocr", "pure")


class TextVQA(TenAnswers):
    """Accuracy of TextVQA's evaluator (M4C), with OCR tokens and without."""

    name = "textvqa"
    published = (5_000,)

    def read(self, data: str, images: str | None) -> list[Item]:
        files = Files(self.name, data)
        head = files.object(_QUESTIONS, files.json(_QUESTIONS))
        version = head.get("dataset_version")
        if version != _VERSION:
            raise UsageError(f"{self.name}: {_QUESTIONS} says dataset_version {version!r}, expected {_VERSION!r}")
        entries = self.need(head, "data", list, _QUESTIONS)
        tokens = self._tokens(files, entries)
        folders = files.images(images, "train_images", "train_val_images/train_images", "train_val_images.zip")
        self.digest = files.digest
        pairs = [pair for entry in entries for pair in self._items(entry, tokens)]
        return self.place(pairs, folders)

    def questions(self) -> int:
        return len(self.items) // len(VARIANTS)

    def score(self, item: Item, prediction: str, p_yes: float | None) -> Score:
        return Score(m4c_score(prediction, item.answers))

    @classmethod
    def measure(cls, table: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        means = means_by_type(table, weights)
        return {OVERALL: means.get("ocr", float("nan")), **means}

    def _items(self, entry: dict, tokens: dict) -> list[tuple[Item, str]]:
        number = self.need(entry, "question_id", (int, str), "an entry")
        question, image = (self.need(entry, key, str, f"question {number}") for key in ("question", "image_id"))
        answers = self.people(entry.get("answers"), str(number))
        words = tokens.get((image, question.lower()), tokens.get(image, ""))
        prompts = {"ocr": f"{_OCR}{words}\n{question}\n{SHORT_ANSWER}", "pure": f"{question}\n{SHORT_ANSWER}"}
        best = most_frequent(answers)
        return [
            (Item(f"{kind}/{number}", question, prompts[kind], answers, best, kind), f"{image}.jpg")
            for kind in VARIANTS
        ]

    def _tokens(self, files: Files, entries: list) -> dict:
        """OCR tokens, joined, by image; from LLaVA's file by image and question.

        Raises:
            UsageError: there is no file with them, or it lacks images.
        """
        if files.find(_ROSETTA):
            data = self.need(files.object(_ROSETTA, files.json(_ROSETTA)), "data", list, _ROSETTA)
            tokens = {entry["image_id"]: ", ".join(info["word"] for info in entry["ocr_info"]) for entry in data}
            lacking = [entry["image_id"] for entry in entries if entry.get("image_id") not in tokens]
        elif files.find(_LLAVA):
            tokens = dict(self._from_llava(line) for line in files.json_lines(_LLAVA))
            keys = [(entry.get("image_id"), str(entry.get("question")).lower()) for entry in entries]
            lacking = [image for image, question in keys if (image, question) not in tokens]
        elif all(isinstance(entry.get("ocr_tokens"), list) for entry in entries):
            return {entry["image_id"]: ", ".join(entry["ocr_tokens"]) for entry in entries}
        else:
            raise UsageError(f"{self.name}: there are no OCR tokens: add {_ROSETTA} (textvqa.org) or {_LLAVA} (LLaVA)")
        if lacking:
            raise UsageError(f"{self.name}: no OCR tokens for {len(lacking)} questions, first of image {lacking[0]}")
        return tokens

    def _from_llava(self, line: dict) -> tuple[tuple[str, str], str]:
        image, text = (self.need(line, key, str, _LLAVA) for key in ("question_id", "text"))
        question, _, rest = text.partition(f"\n{_OCR}")
        return (image, question.lower()), rest.partition("\n")[0]
