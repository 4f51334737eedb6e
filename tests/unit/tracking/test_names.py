"""Names that MLflow takes, made of any text: asked of MLflow's own database."""

import itertools

import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name, _validate_param_name

from tests.helpers.toy_workflow import recipe
from workflows.recipe.schema import Recipe
from workflows.tracking.tracker import Tracker, metric_name, text_of

HARD = [
    "what is it?",
    "colour (of the car)",
    "R&D",
    "it's",
    "50%",
    "",
    "/",
    "//",
    "a//b",
    "/a",
    "a/",
    ".",
    "..",
    "a/./b",
    "../a",
    "...",
    "..a",
    "a\nb",
    "a\n",
    "\0",
    "\ud800",
    "\U0001f600",
    "日本",
    "é",
    "e\u0301",
    "_x3F_",
    "?x3F_",
    "_xA?",
    "_x?",
    "_x5F_x3F_",
    "_x00_",
    "margin_over_blind",
    "__x41__",
    "$\\frac{1}{2}$",
    "{a: b}",
    '#<>|*"`;,=+!@^~[]',
]


@pytest.mark.parametrize("text", HARD)
def test_mlflow_takes_the_name_of_any_text_and_it_is_read_back(text):
    for whole in (text, f"test/{text}", f"{text}/low", f"blind/{text}"):
        _validate_metric_name(metric_name(whole))
        _validate_param_name(metric_name(whole))
        assert text_of(metric_name(whole)) == whole


def test_two_texts_have_two_names():
    texts = ["".join(parts) for n in range(6) for parts in itertools.product("_xA?/", repeat=n)]
    names = [metric_name(text) for text in texts]
    assert len(set(names)) == len(texts)
    assert [text_of(name) for name in names] == texts


def test_usual_names_stay_and_long_ones_are_told_apart():
    for text in ("yes/no", "colour", "train/loss", "pope/partial/text/f1", "a b: c.d-e", "Größe"):
        assert metric_name(text) == text
    assert metric_name("what is it?") == "what is it_x3F_"
    one, two = (metric_name("why? " * 100 + end) for end in "ab")
    assert len(one) == len(two) == MAX_ENTITY_KEY_LENGTH
    assert one != two


def test_a_run_keeps_every_number_and_a_gate_on_any_type_of_question(tmp_path):
    gate = {"least": {"what is it?": 0.5, "R&D (new)": 0.1}}
    content = Recipe.model_validate(recipe(tmp_path, evaluate={"gate": gate}))
    notes = []
    (tmp_path / "run").mkdir()
    tracker = Tracker(tmp_path, content, "tiny-run", tmp_path / "run", notes.append)
    tracker.log_metrics({f"test/{text}": number for number, text in enumerate(HARD)}, 0)
    tracker.finish("FINISHED")
    assert notes == []
    run = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(tracker.run_id)
    assert {text_of(name): value for name, value in run.data.metrics.items()} == {
        f"test/{text}": number for number, text in enumerate(HARD)
    }
    assert run.data.params[metric_name("evaluate.gate.least.what is it?")] == "0.5"
    with pytest.raises(Exception, match="Invalid"):  # what such a name does without
        tracker.client.log_batch(tracker.run_id, metrics=[Metric("test/what is it?", 1.0, 0, 0)])
