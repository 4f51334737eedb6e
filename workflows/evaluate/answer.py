"""A model that answers batches of questions about pictures: each picture is encoded and read once."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mlmamba.conversation import Turn
from mlmamba.loading import load_model
from mlmamba.pictures import load_pixels


@dataclass(frozen=True)
class Asked:
    """One picture's encoded bytes (None for text only) and its questions."""

    image: bytes | None
    questions: list[str]


class Answerer:
    """Greedy answers of one model.

    Args:
        model: model folder.
        max_new_tokens: longest answer.
        threads: torch threads; None leaves them.
    """

    def __init__(self, model: str | Path, max_new_tokens: int, threads: int | None = None):
        if threads:
            torch.set_num_threads(threads)
        self.model, self.processor = load_model(model)
        self.max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def answer(self, asked: list[Asked]) -> list[list[str]]:
        """Answers to all questions, in the order given; each question is asked alone, without the others."""
        shown = [item for item in asked if item.image is not None]
        features = None
        if shown:
            pixels = np.stack([load_pixels(item.image, self.processor.image_size) for item in shown])
            features = self.model.get_image_features(torch.from_numpy(pixels).to(self.model.device))
        prompts, owner = [], []
        for item in asked:
            has_image = item.image is not None
            index = next(i for i, other in enumerate(shown) if other is item) if has_image else None
            for question in item.questions:
                prompts.append(self.processor.prompt([Turn("user", question, images=int(has_image))]))
                owner += [index] if has_image else []
        inputs = self.processor.tokenize(prompts).to(self.model.device)
        used = None if features is None else features[torch.tensor(owner, device=features.device)]
        ids = self.model.generate(
            **inputs, image_features=used, max_new_tokens=self.max_new_tokens, do_sample=False, use_cache=True
        )
        texts = self.processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        flat = iter(text.strip() for text in texts)
        return [[next(flat) for _ in item.questions] for item in asked]
