"""The easy-vqa package as a source: one record per image, with all its questions as one conversation.

The image is shown in the first turn. Every later question is asked without it, which makes the model carry what it
saw in its state, and costs one image's tokens instead of ten.
"""

import hashlib
import json
from collections.abc import Iterator
from importlib import resources

from mlmamba.conversation import Turn
from pipelines.shuffle import permutation
from pipelines.source_config import EasyVQASource
from pipelines.sources.source import Listed, Record

_SHAPES = ("circle", "rectangle", "triangle")


def question_type(answer: str) -> str:
    """Kind of question that has this answer: "yes/no", "shape" or "colour"."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in _SHAPES else "colour"


class EasyVQA(Listed):
    """Reader of an `EasyVQASource`. Raises ModuleNotFoundError, saying what to install, without the package."""

    def __init__(self, config: EasyVQASource):
        self.config = config
        try:
            self._data = resources.files("easy_vqa") / "data"
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the source easy_vqa needs the package easy-vqa: pip install mlmamba[quickstart]"
            ) from error
        self._folder = "test" if config.split == "test" else "train"

    def records(self) -> Iterator[Record]:
        """One record per image of the split, by image number; turns in the package's order."""
        questions: dict[int, list[tuple[str, str]]] = {}
        for question, answer, image in json.loads(self._questions()):
            questions.setdefault(image, []).append((question, answer))
        for image in self._images(sorted(questions)):
            turns = []
            for i, (question, answer) in enumerate(questions[image]):
                turns += [Turn("user", question, images=int(i == 0)), Turn("assistant", answer)]
            yield Record(
                id=f"easy-vqa-{self._folder}-{image}",
                source=self.config.label,
                images=[f"{self._folder}/images/{image}.png"],
                turns=turns,
                question_types=[question_type(answer) for _, answer in questions[image]],
            )

    def read_image(self, location: str) -> bytes:
        """The PNG file, 64 x 64 pixels."""
        return (self._data / location).read_bytes()

    def fingerprint(self) -> str:
        """Digest of the package's question file."""
        return hashlib.sha256(self._questions()).hexdigest()

    def _questions(self) -> bytes:
        return (self._data / self._folder / "questions.json").read_bytes()

    def _images(self, images: list[int]) -> list[int]:
        if self.config.split == "test":
            return images
        # A fixed key, not the recipe's seed: another training seed must not move images between the splits.
        order = permutation(len(images), "easy_vqa")
        first_held_out = len(images) - self.config.validation_images
        chosen = order[first_held_out:] if self.config.split == "validation" else order[:first_held_out]
        return [images[i] for i in sorted(chosen)]
