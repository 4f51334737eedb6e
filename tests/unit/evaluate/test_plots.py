"""Figures of anybody's text: nothing in it is read as mathematics, and no warning reaches the output of a command."""

import io
import json
import warnings

import numpy as np
from PIL import Image

from tests.helpers.evaluations import HOSTILE
from tests.helpers.toy_workflow import recipe, write_corpus
from workflows.evaluate.plots import Bar, draw_sheet, plot_confusion, plot_scores
from workflows.evaluate.questions import load_questions
from workflows.evaluate.statistics import Interval
from workflows.recipe.schema import Recipe

TEXTS = [HOSTILE, "这是什么颜色?", "\U0001f600", "यह क्या है", "$\\frac{1}{2$", "100% \\_ ^{", "a\nb"]


def test_the_sheet_of_samples(tmp_path):
    write_corpus(tmp_path)
    entries = json.loads((tmp_path / "test.json").read_text())
    for entry, text in zip(entries, TEXTS, strict=False):
        entry["id"] = text
        for turn in entry["conversations"]:
            turn["value"] = ("<image>" if "<image>" in turn["value"] else "") + text
    (tmp_path / "test.json").write_text(json.dumps(entries[: len(TEXTS)]))
    content = Recipe.model_validate(recipe(tmp_path))
    images = load_questions(content.data.test)
    said = {key: "".join(TEXTS) for image in images for key in image.ids}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sheet = draw_sheet(content, images, said)
    assert Image.open(io.BytesIO(sheet)).size[0] == 1460


def test_the_reports_figures():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_scores([Bar(text, Interval(0.5, 0.4, 0.6, 9), 0.1, None) for text in TEXTS])
        assert plot_confusion(np.eye(len(TEXTS)), TEXTS, TEXTS)
