"""One run of the ablation (tests/benchmarks/studies/ablation.py): build, train, save, score.

The parts are those of `mlmamba run`: model, freezing, parameter groups, schedule, reader, loss, saved folder, answers
and score. Ray and DeepSpeed are left out, and the frozen encoder reads each image once per process, since its
features are the same in every run. One thread, and each image encoded alone, so a run does not depend on what its
process did before.
"""

import hashlib
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from mlmamba.answering import Answerer, Asked
from mlmamba.loading import load_model
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.vision import VisionEncoder
from pipelines.reader import PackedDataset, prefetch, step_indices
from tests.benchmarks.studies.ablation_settings import BLIND, Series, Setting, variant
from workflows.evaluate.benchmarks.own_data import TestSources
from workflows.evaluate.collect import blind_images
from workflows.evaluate.probe import count_parameters
from workflows.evaluate.questions import open_store
from workflows.evaluate.results import columns, measure
from workflows.evaluate.scoring import row_of
from workflows.recipe.load import load_recipe
from workflows.recipe.schema import Recipe
from workflows.recipe.train import StageRecipe
from workflows.train.initial import build_initial, save
from workflows.train.optim import parameter_groups, schedule
from workflows.train.stage import freeze
from workflows.train.step import batch_maker


def run(series: Series, setting: Setting) -> dict:
    """Do one run and write its line. Returns the line."""
    torch.set_num_threads(1)
    disable_progress_bar()
    start = time.perf_counter()
    recipe = variant(load_recipe(series.recipe), setting)
    with tempfile.TemporaryDirectory() as folder:
        initial, trained = Path(folder) / "initial", Path(folder) / "trained"
        build_initial(recipe, series.data, initial)
        model, processor = load_model(initial, "cpu")
        same_language_model(model, setting.seed)
        losses = train(model, series, recipe, setting)
        save(model, processor.tokenizer, trained)
        training = time.perf_counter() - start
        scores = score(trained, recipe, blind=setting == BLIND)
    line = {
        "plan": series.plan,
        **asdict(setting),
        "parameters": count_parameters(model.connector),
        "losses": losses,
        **scores,
        "seconds": {"train": training, "all": time.perf_counter() - start},
    }
    with series.lines.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def same_language_model(model: MLMambaForConditionalGeneration, seed: int) -> None:
    """First weights of the language model that depend on the seed alone, not on what a connector drew before it."""
    torch.manual_seed(seed)
    model.language_model.load_state_dict(Mamba2LanguageModel(model.config.text_config).state_dict())


def train(model: MLMambaForConditionalGeneration, series: Series, recipe: Recipe, setting: Setting) -> dict[str, float]:
    """Train by the stages. Returns the mean loss of the last tenth of each.

    A stage goes on in the order of rows where the one before it stopped, so that runs with the connector's stage and
    without see the same rows in the same order. (`mlmamba run` begins a pass with each stage.)
    """
    dataset, done, losses = PackedDataset(str(series.data)), 0, {}
    encoder, model.vision = model.vision, Remembered(model.vision)
    for stage in series.stages(recipe, setting.stage):
        values = train_stage(model, stage, dataset, setting.seed, done)
        last = values[-max(1, len(values) // 10) :]
        losses[stage.name] = sum(last) / len(last)
        done += stage.steps
    model.vision = encoder
    return losses


def train_stage(
    model: MLMambaForConditionalGeneration, stage: StageRecipe, dataset: PackedDataset, seed: int, done: int
) -> list[float]:
    """The losses of a stage's steps. A step's rows are one micro batch, in which every loss token weighs the same."""
    freeze(model, stage)
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, stage), betas=(0.9, 0.98), eps=1e-8)
    scheduler = schedule(stage, optimizer, stage.steps)
    make = batch_maker(dataset, stage.batch_rows, model)
    stream = prefetch(make, step_indices(dataset, seed, stage.batch_rows, 0, 1, done), threads=1)
    losses = []
    for _, (batch,) in zip(range(stage.steps), stream, strict=False):
        inputs = batch.to(model.device)
        loss = model(**inputs, logits_to_keep=1, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    stream.close()
    return losses


class Remembered(nn.Module):
    """A frozen VisionEncoder that reads each image once per process."""

    seen: dict[tuple[bytes, bytes], Tensor] = {}  # noqa: RUF012 - shared by the models of a process
    """Features (N, channels) by the digests of the encoder's weights and of the image."""

    def __init__(self, encoder: VisionEncoder):
        super().__init__()
        self.encoder = encoder
        self.grid, self.channels, self.patch = encoder.grid, encoder.channels, encoder.patch
        self.weights = hashlib.sha256(b"".join(_bytes(value) for value in encoder.state_dict().values())).digest()

    def grids(self, _: None) -> tuple[int, int]:
        return self.grid

    def forward(self, pixels: Tensor, _: None = None) -> Tensor:
        """uint8 (n, 3, s, s) -> (n, N, channels)."""
        return torch.stack([self._read(one) for one in pixels])

    def _read(self, pixels: Tensor) -> Tensor:
        key = self.weights, hashlib.sha256(_bytes(pixels)).digest()
        if key not in self.seen:
            self.encoder.eval()
            with torch.inference_mode(False), torch.no_grad():  # training may keep what is made here for its gradients
                self.seen[key] = self.encoder(pixels[None].clone())[0]
        return self.seen[key]


def _bytes(values: Tensor) -> bytes:
    return values.numpy().tobytes()


def score(folder: Path, recipe: Recipe, blind: bool) -> dict[str, dict[str, float]]:
    """Scores of a saved model on the recipe's test sources, by `mlmamba evaluate`'s rules.

    Returns:
        {"scores": {"overall": ..., "yes/no": ..., ...}}, and "blind" and "majority" alike, if asked for.
    """
    benchmark = TestSources(recipe)
    answerer = Answerer(folder, benchmark.max_new_tokens, threads=1)
    answerer.model.vision = Remembered(answerer.model.vision)
    shown = {item.id: (item.source, item.image) for item in benchmark.items}
    at_once = recipe.evaluate.batch_images
    found = {"scores": _answers(answerer, benchmark, shown, at_once)}
    if blind:
        found["blind"] = _answers(answerer, benchmark, blind_images(benchmark.items, recipe.seed), at_once)
        found["majority"] = dict.fromkeys(shown, benchmark.majority())
    return {name: _measure(benchmark, texts) for name, texts in found.items()}


def _answers(answerer: Answerer, benchmark: TestSources, shown: dict[str, tuple], at_once: int) -> dict[str, str]:
    """Answers by id of the item, each item asked with the image (source, location) that is shown for it."""
    stores = [open_store(store) for store in benchmark.stores]
    groups: dict[tuple, list] = {}
    for item in benchmark.items:
        groups.setdefault(shown[item.id], []).append(item)
    images, texts = list(groups.items()), {}
    for first in range(0, len(images), at_once):
        some = images[first : first + at_once]
        asked = [Asked(stores[source].read(image), [i.prompt for i in items]) for (source, image), items in some]
        for (_, items), answers in zip(some, answerer.answer(asked), strict=True):
            texts |= {item.id: text for item, text in zip(items, answers, strict=True)}
    return texts


def _measure(benchmark: TestSources, texts: dict[str, str]) -> dict[str, float]:
    rows = [row_of(benchmark, item, {"text": texts[item.id]}) for item in benchmark.items]
    return measure(benchmark.name, columns(rows))
