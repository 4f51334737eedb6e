"""Validation while a stage trains: loss and score on the validation split, and answers to a few of its questions."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from mlmamba.conversation import IGNORE_INDEX
from mlmamba.image_layout import ImageLayout
from pipelines.reader import PackedDataset, PackedRow
from workflows.train.step import batch_maker


@dataclass(frozen=True)
class Measured:
    """What the first rows of the validation split gave."""

    loss: float
    """Mean per loss token."""
    score: float
    """Share of the answers that greedy decoding would give to the last token."""


class Validation:
    """Measure loss and score over the first rows of the validation split.

    An answer is right when the most likely token is the right one at each of its places, its end included, given what
    comes before. That is when greedy decoding gives it and nothing else, so no token has to be decoded: the pass that
    measures the loss shows it. What comes before are the conversation's right answers, where it has several; unlike
    the evaluation after training, case and punctuation count.

    Args:
        dataset: the validation split.
        rows: how many rows at most.
        micro_batch_rows: rows that one worker runs at once.
        model, pin, features: as `batch_maker` takes them.
    """

    def __init__(
        self, dataset: PackedDataset, rows: int, micro_batch_rows: int, model, pin: bool = False, features=None
    ):
        self._rows = min(rows, len(dataset))
        self._micro = micro_batch_rows
        self._make = batch_maker(dataset, micro_batch_rows, model, pin, features=features)

    def measure(self, engine, rank: int, world: int) -> Measured:
        """Over all ranks; the score is that of all answers, however many each rank has.

        A collective call: all ranks run equally many batches, because ZeRO-3 gathers parameters in each.
        """
        per_pass = world * self._micro
        sums = torch.zeros(4, device=engine.device, dtype=torch.float64)
        engine.eval()
        with torch.no_grad():
            for first in range(0, self._rows, per_pass):
                mine = range(first + rank * self._micro, first + (rank + 1) * self._micro)
                # Past the end the last row is repeated in its place, and does not count.
                rows = [min(row, self._rows - 1) for row in mine]
                (batch,) = self._make(rows, [row < self._rows for row in mine])
                inputs = batch.to(engine.device)
                output = engine(**inputs, num_items_in_batch=1, logits_to_keep=1, use_cache=False)
                right, answers = count_right(batch.inputs["positions"].labelled, output.correct.cpu())
                sums += torch.tensor([0.0, batch.predicted, right, answers], device=sums.device, dtype=sums.dtype)
                sums[0] += output.loss.double()
        engine.train()
        dist.all_reduce(sums)
        loss, tokens, right, answers = sums.tolist()
        return Measured(loss / max(1, tokens), right / max(1, answers))


def count_right(labelled: torch.Tensor, correct: torch.Tensor) -> tuple[int, int]:
    """How many answers are right, and how many there are.

    Args:
        labelled: (m,) ascending positions that predict a token of an answer; neighbours are of one answer.
        correct: (m,) bool, whether each does.
    """
    if not len(labelled):
        return 0, 0
    answer = torch.nn.functional.pad((labelled.diff() > 1).long().cumsum(0), (1, 0))
    wrong = torch.zeros(int(answer[-1]) + 1, dtype=torch.long).index_add(0, answer, (~correct).long())
    return int((wrong == 0).sum()), len(wrong)


@dataclass(frozen=True)
class Question:
    """The first question of a packed sample, and its answer, as token ids."""

    prompt: list[int]
    answer: list[int]
    images: list[bytes]
    pixels: int
    """Version of the rules of colour of its data set."""


class Samples:
    """Answer the same validation questions each time, greedily. Every rank computes them, because ZeRO-3 is collective.

    Each token takes a whole forward pass without a recurrent state. That is slower than `generate`, but it runs through
    the engine however the parameters are sharded, and questions are few and answers short.

    Args:
        data: folder of the data set.
        model: folder with the tokenizer.
        count: questions at most.
        tokens: longest answer.
        layout: how images are cut for the encoder.
    """

    def __init__(self, data: str, model: str, count: int, tokens: int, image_token_id: int, layout: ImageLayout):
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._tokens, self._image_token_id, self._layout = tokens, image_token_id, layout
        self._questions = _first_questions(PackedDataset(data, "validation"), count)

    def answers(self, engine) -> list[dict]:
        """Return `question`, `answer` (the right one) and `prediction` of each question."""
        engine.eval()
        rows = []
        with torch.no_grad():
            for question in self._questions:
                rows.append(
                    {
                        "question": self._text([i for i in question.prompt if i != self._image_token_id]),
                        "answer": self._text(question.answer),
                        "prediction": self._text(self._predict(engine, question)),
                    }
                )
        engine.train()
        return rows

    def _predict(self, engine, question: Question) -> list[int]:
        ids = torch.tensor([question.prompt], device=engine.device)
        inputs = {}
        if question.images:
            inputs = self._layout.batch([self._layout.load(image, question.pixels) for image in question.images])
            inputs["pixel_values"] = inputs["pixel_values"].to(engine.device)
        for _ in range(self._tokens):  # a fixed number, so that no rank waits for another in a gather
            scores = engine(input_ids=ids, **inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
            scores[:, self._image_token_id] = -torch.inf  # the image token is never an answer
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        said = ids[0, len(question.prompt) :].tolist()
        end = self._tokenizer.eos_token_id
        return said[: said.index(end)] if end in said else said

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()


def _first_questions(dataset: PackedDataset, count: int) -> list[Question]:
    """The first question of each sample, in row order, up to `count`."""
    found: list[Question] = []
    for index in range(len(dataset)):
        row = dataset[index]
        for sample in range(len(row.sample_ids)):
            if len(found) == count:
                return found
            question = _question(row, sample)
            if question is not None:
                found.append(question)
    return found


def _question(row: PackedRow, sample: int) -> Question | None:
    """Split a sample: the tokens before its first labelled run are the prompt, that run the answer; else None."""
    places = np.flatnonzero(row.seq_idx == sample)
    labelled = row.labels[places] != IGNORE_INDEX
    if not labelled.any() or labelled[0]:
        return None
    first = int(labelled.argmax())
    run = labelled[first:]
    last = first + (int((~run).argmax()) if not run.all() else len(run))
    start, end = places[0], places[first]
    images = [image for image, at in zip(row.images, row.image_positions, strict=True) if start <= at < end]
    prompt, answer = row.input_ids[places[:first]].tolist(), row.input_ids[places[first:last]].tolist()
    return Question(prompt, answer, images, row.pixels)
