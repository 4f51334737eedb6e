"""VSR (Liu et al. 2023): is this statement about where things are in the image true? Test sets of two splits.

    zeroshot/test.jsonl (1,222 statements), random/test.jsonl (2,195)   one {image, caption, label, relation} a line
    images/000000050403.jpg                                             images of COCO 2017, in a folder or a zip

Entries have no id; it is the number of the line. Types are the meta-categories of relations of VSR's analysis
(rel_meta_category_dict.txt). The overall scores are over all statements, not the mean over types.
"""

import re

import numpy as np

from workflows.errors import UsageError
from workflows.evaluate.benchmarks.base import Files, Item
from workflows.evaluate.benchmarks.pope import YesNo
from workflows.evaluate.statistics import means_by_type

_RELATIONS = {
    "adjacency": "adjacent to, alongside, at the side of, at the right side of, at the left side of, attached to, "
    "at the back of, ahead of, against, at the edge of",
    "directional": "off, past, toward, down, deep down, up, away from, along, around, from, into, to, across, "
    "across from, through, down from",
    "orientation": "facing, facing away from, parallel to, perpendicular to",
    "projective": "on top of, beneath, beside, behind, left of, right of, under, in front of, below, above, over, "
    "in the middle of",
    "proximity": "by, close to, near, far from, far away from",
    "topological": "connected to, detached from, has as a part, part of, contains, within, at, on, in, with, "
    "surrounding, among, consists of, out of, between, inside, outside, touching",
}
_KIND_OF = {relation: kind for kind, relations in _RELATIONS.items() for relation in relations.split(", ")}
_WORD = re.compile(r"\b(true|false)\b", re.IGNORECASE)


class VSR(YesNo):
    """Accuracy, F1 and the share of True, by first token and by text; "always_true" is the share of true statements."""

    name = "vsr"
    choices = ("True", "False")
    splits = ("zeroshot", "random")

    @property
    def published(self) -> tuple[int, ...]:
        return (1_222,) if self.split == "zeroshot" else (2_195,)

    def read(self, data: str, images: str | None) -> list[Item]:
        files = Files(self.name, data)
        places = [f"{folder}{self.split}/test.jsonl" for folder in ("", "splits/", "data/splits/")]
        entries = files.json_lines(*places)
        folders = files.images(images, "images", "data/images", "trainval2017", "images.zip", "vsr_images.zip")
        self.digest = files.digest
        return self.place((self._item(number, entry) for number, entry in enumerate(entries)), folders)

    def said(self, text: str) -> float | None:
        found = _WORD.search(text)
        return None if found is None else float(found[1].lower() == "true")

    def majority(self) -> str:
        return "True"

    @classmethod
    def measure(cls, table: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        scores = cls._of(table, weights) | means_by_type(table, weights)
        scores |= {f"text/{kind}": value for kind, value in means_by_type(table, weights, "text_score").items()}
        return scores | {"always_true": float(table["positive"] @ weights / weights.sum())}

    def _item(self, number: int, entry: dict) -> tuple[Item, str]:
        where = f"statement {number}"
        caption, image, relation = (self.need(entry, key, str, where) for key in ("caption", "image", "relation"))
        label = self.need(entry, "label", int, where)
        if label not in (0, 1):
            raise UsageError(f"{self.name}: {where} has the label {label!r}, expected 0 or 1")
        answer = "True" if label else "False"
        prompt = (
            f'Based on the image, is this statement "True" or "False"? {caption}\n'
            'Respond with "True" or "False" directly.'
        )
        kind = _KIND_OF.get(relation, "unallocated")
        details = {"positive": label}
        return Item(f"{self.split}/{number}", caption, prompt, [answer], answer, kind, details=details), image
