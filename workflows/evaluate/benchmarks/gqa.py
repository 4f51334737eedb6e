"""GQA's balanced test-dev split (Hudson and Manning 2019): 12,578 questions about 398 images.

    testdev_balanced_questions.json   {id: {imageId, question, answer, isBalanced, types: {structural}}}
    images/n161313.jpg                images, in a folder or in images.zip

Both sides lose punctuation and case, then have to be equal. GQA's own script compares as they are, and evaluations
prepare the prediction alone: TRI-ML/vlm-evaluation like this, LLaVA by dropping a last full stop and the case.
"""

import string

from workflows.errors import UsageError
from workflows.evaluate.benchmarks.base import SHORT_ANSWER, Benchmark, Files, Item, Score

_QUESTIONS = "testdev_balanced_questions.json"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class GQA(Benchmark):
    """Exact match with the one answer, by structural type."""

    name = "gqa"
    published = (12_578,)

    def read(self, data: str, images: str | None) -> list[Item]:
        files = Files(self.name, data)
        places = [f"{folder}{_QUESTIONS}" for folder in ("", "questions/", "questions1.2/")]
        content = files.object(_QUESTIONS, files.json(*places))
        folders = files.images(images, "images", "allImages/images", "images.zip")
        self.digest = files.digest
        return self.place((self._item(key, files.object(key, entry)) for key, entry in content.items()), folders)

    def score(self, item: Item, prediction: str, p_yes: float | None) -> Score:
        return Score(float(normalise_gqa(prediction) == normalise_gqa(item.answer)))

    def _item(self, key: str, entry: dict) -> tuple[Item, str]:
        question, answer, image = (
            self.need(entry, field, str, f"question {key}") for field in ("question", "answer", "imageId")
        )
        if entry.get("isBalanced") is False:
            raise UsageError(f"{self.name}: question {key} is not of the balanced set; give {_QUESTIONS}")
        kind = (entry.get("types") or {}).get("structural", "all")
        return Item(key, question, f"{question}\n{SHORT_ANSWER}", [answer], answer, kind), f"{image}.jpg"


def normalise_gqa(answer: str) -> str:
    """An answer without punctuation, case and outer space."""
    return answer.translate(_NO_PUNCTUATION).lower().strip()
