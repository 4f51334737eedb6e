"""Types of question that are called as a score of ours: kept apart, and said."""

import itertools
import json

from mlflow.tracking import MlflowClient
from PIL import Image

from workflows.evaluate.benchmarks import open_benchmark
from workflows.evaluate.benchmarks.own_data import TestSources
from workflows.evaluate.results import read_scores, table, type_name
from workflows.evaluate.run import finish, flat_scores, log_evaluation
from workflows.evaluate.scoring import score_predictions
from workflows.tracking.tracker import connect, text_of


def write_questions(root, types: list[str]):
    """One image and question for each type; the source of a recipe that reads them."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, kind in enumerate(types):
        Image.new("RGB", (20, 20), (i * 7 % 255, 0, 0)).save(root / f"{i}.png")
        rows.append({"id": str(i), "image": f"{i}.png", "question": "what?", "answer": "yes", "kind": kind})
    (root / "test.json").write_text(json.dumps(rows))
    return {
        "type": "questions",
        "annotations": str(root / "test.json"),
        "images": str(root),
        "image": "image",
        "question_type": "kind",
    }


def open_questions(root, types: list[str]) -> TestSources:
    from tests.helpers.toy_workflow import recipe, write_corpus
    from workflows.recipe.schema import Recipe

    write_corpus(root)
    content = recipe(root)
    content["data"]["test"] = [write_questions(root / "own", types)]
    return TestSources(Recipe.model_validate(content))


def test_a_type_called_overall_does_not_take_the_place_of_the_overall_score(tmp_path):
    types = ["overall"] * 2 + ["colour"] * 4 + ["blind/overall", "overall/low", "margin_over_blind", "pope/overall"]
    benchmark = open_questions(tmp_path, types)
    right = {item.id: "yes" if item.type == "colour" else "no" for item in benchmark.items}
    score_predictions(benchmark, right, tmp_path / "out", "said")
    result = finish(tmp_path / "out", {})
    assert result["scores"]["overall"] == 0.4
    assert result["questions"]["overall"] == 10
    assert result["scores"]["type/overall"] == 0.0
    assert result["questions"]["type/overall"] == 2
    assert result["intervals"]["overall/low"] > 0
    assert "pope/overall" not in result["scores"]
    assert any("'overall' as type/overall" in note for note in result["notes"])
    assert "type/overall/low/score" in table(read_scores(tmp_path / "out"))


def test_two_types_have_two_names_and_none_of_ours():
    parts = ("overall", "low", "score", "type", "blind", "x", "")
    types = {"/".join(kinds) for n in (1, 2, 3) for kinds in itertools.product(parts, repeat=n)}
    names = {type_name(kind, ("script",)) for kind in types}
    assert len(names) == len(types)
    flat = [f"{part}{name}{end}" for name in names for part in ("", "blind/", "majority/") for end in ("", "/low")]
    ours = {"overall", "overall/low", "blind/overall", "margin_over_blind", "partial/x"}
    assert len(set(flat)) == len(flat)
    assert not ours & set(flat)
    assert type_name("script", ("script",)) == "type/script"
    for usual in ("yes/no", "colour", "what is it?", "low", "score", "test"):
        assert type_name(usual) == usual


def test_scores_of_any_type_are_logged_whole(tmp_path):
    types = ["what is it?", "R&D (new)", "it's 50%", "", "a//b", "日本 😀", "overall", "overall/high", "x" * 400]
    benchmark = open_questions(tmp_path, types)
    score_predictions(benchmark, {item.id: "yes" for item in benchmark.items}, tmp_path / "out", "said")
    result = finish(tmp_path / "out", {})
    connect(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = client.create_run(client.create_experiment("odd", (tmp_path / "mlflow").as_uri())).info.run_id
    log_evaluation(client, run_id, "own", tmp_path / "out", result)
    metrics = client.get_run(run_id).data.metrics
    flat = flat_scores(result, "own/")
    assert len(metrics) == len(flat)
    assert {text_of(name) for name in metrics} >= {name for name in flat if len(name) < 200}


def test_a_published_benchmark_keeps_its_own_scores(tmp_path):
    from tests.helpers.published_benchmarks import write_pope

    write_pope(tmp_path, images=2, per_image=2)
    benchmark = open_benchmark("pope", str(tmp_path), questions=12)
    assert {item.type for item in benchmark.items} == {"random", "popular", "adversarial"}
    assert not any("types of question" in note for note in benchmark.notes)
