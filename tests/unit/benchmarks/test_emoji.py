"""The study of a small corpus: its probe finds what is linear in features, and its corpus is what the recipe reads."""

import json

import torch

from tests.benchmarks.studies.emoji import KINDS, QUESTION, TEST, TRAIN, data_recipe, probe
from workflows.recipe.load import load_recipe


def test_the_probe_finds_what_is_linear_and_guesses_where_nothing_is():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(len(KINDS), (700,), generator=g)
    noise = torch.randn(700, 20, generator=g)
    shown = noise + 5 * torch.nn.functional.one_hot(y, 20)
    assert probe((shown[:500], y[:500]), (shown[500:], y[500:])) > 0.95
    assert probe((noise[:500], y[:500]), (noise[500:], y[500:])) < 0.35


def test_a_corpus_that_is_there_is_not_fetched_and_fits_the_recipe(tmp_path):
    for drawer in (TRAIN, TEST):
        (tmp_path / drawer).mkdir()
        entry = {"image": "a.png", "question": QUESTION, "answer": "food", "kind": "food"}
        (tmp_path / f"{drawer}.json").write_text(json.dumps([entry]))
    recipe = load_recipe("small-corpus", [f"data={data_recipe(tmp_path)}", "name=emoji"])
    assert not recipe.data.sources("validation")  # all drawings are for training, as they are for the probe
    assert recipe.data.test[0].question_type == "kind"
    assert recipe.model.vision.grid**2 == 16
