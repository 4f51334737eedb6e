"""From replies to rows and scores: what is missing is named, and nothing is scored twice."""

import json
from pathlib import Path

import pytest

from pipelines.config import TokenizerConfig
from pipelines.sources.entries import with_system
from pipelines.tokenizer import load_or_train
from tests.helpers.packed_set import image_of, turns_of, write_packed_set
from tests.helpers.published_benchmarks import write_gqa, write_pope
from tests.helpers.tiny import granite_tokenizer
from tests.helpers.toy_workflow import recipe, write_corpus
from workflows.console import Console
from workflows.errors import UsageError, WorkflowError
from workflows.evaluate.benchmarks import open_benchmark
from workflows.evaluate.collect import blind_images, derangement, read_parts
from workflows.evaluate.questions import open_store
from workflows.evaluate.results import columns, measure, read_answers, read_image, read_scores
from workflows.evaluate.run import evaluate_recipe, evaluation_folder, model_digest
from workflows.evaluate.scoring import (
    Incomplete,
    missing_items,
    read_predictions,
    row_of,
    score_predictions,
    write_result,
)
from workflows.recipe.schema import Recipe


@pytest.fixture
def pope(tmp_path):
    return open_benchmark("pope", str(tmp_path / "pope"), questions=write_pope(tmp_path / "pope"))


def replies(benchmark, **changes) -> dict[str, dict[str, dict]]:
    """Yes to everything, a little less sure of the other image."""
    seeing = {item.id: {"text": "Yes", "p_first": 0.9} for item in benchmark.items}
    return {"seeing": seeing, "blind": {key: {"text": "No", "p_first": 0.4} for key in seeing}} | changes


def test_rows_and_scores_can_be_read_back(pope, tmp_path):
    found, others = replies(pope), blind_images(pope.items, 7)
    rows = [row_of(pope, i, found["seeing"][i.id], found["blind"][i.id], others[i.id]) for i in pope.items]
    result = write_result(pope, rows, {}, tmp_path / "out", "tiny")
    assert read_scores(tmp_path / "out") == result
    assert result["complete"]
    assert result["missing"] == {"count": 0, "ids": [], "reasons": {}}
    back = read_answers(tmp_path / "out")
    assert [row.id for row in back] == [item.id for item in pope.items]
    first = back[0]
    assert (first.score, first.text_score, first.text_yes, first.p_yes) == (1.0, 1.0, 1.0, 0.9)
    assert (first.blind_score, first.blind_text_yes, first.majority_score) == (0.0, 0.0, 1.0)
    assert read_image(result, first) != read_image(result, first, blind=True)
    assert measure("pope", columns(back)) == pytest.approx(
        {k: v for k, v in result["scores"].items() if k != "margin_over_blind"}
    )
    assert result["scores"]["f1"] == pytest.approx(2 / 3)
    assert result["blind"]["yes_rate"] == 0.0
    assert result["scores"]["margin_over_blind"] == 0.0


def test_a_score_of_a_part_says_so(pope, tmp_path):
    rows = [row_of(pope, item, {"text": "Yes", "p_first": 0.9}) for item in pope.items[:6]]
    missing = {item.id: "no answer" for item in pope.items[6:]}
    result = write_result(pope, rows, missing, tmp_path, "tiny")
    assert not result["complete"]
    assert result["missing"]["count"] == 18
    assert result["missing"]["reasons"] == {"no answer": 18}
    assert result["blind"] == {}
    assert "text/f1/popular" not in result["scores"]  # of a split that nothing was answered of: no number


def test_what_is_missing_is_named_with_its_reason(pope):
    found = replies(pope)
    found["seeing"].pop("random/3")
    found["blind"]["popular/2"] = {"error": "image x.jpg: the image data is damaged"}
    pope.missing["adversarial/1"] = "there is no image y.jpg"
    missing = missing_items(pope, found, [item.id for item in pope.items])
    assert missing == {
        "adversarial/1": "there is no image y.jpg",
        "random/3": "no answer",
        "popular/2": "image x.jpg: the image data is damaged",
    }
    message = str(Incomplete(pope, missing, "were not answered", "Run again"))
    assert "no score, 3 of 24 items (adversarial/1, random/3, popular/2) were not answered" in message
    assert "--allow-partial" in message
    found["seeing"]["random/99"] = {"text": "Yes"}
    with pytest.raises(WorkflowError, match=r"unknown 1 items \(random/99\)"):
        missing_items(pope, found, [])


def test_empty_answers_are_wrong_and_are_reported(tmp_path):
    count = write_gqa(tmp_path / "gqa")
    gqa = open_benchmark("gqa", str(tmp_path / "gqa"), questions=count)
    said = {item.id: "" for item in gqa.items} | {gqa.items[0].id: "x" * 100_000}
    result = score_predictions(gqa, said, tmp_path / "out", "test")
    assert result["scores"]["overall"] == 0.0
    assert any(note.startswith("11 answers are empty (") for note in result["notes"])
    assert len(read_answers(tmp_path / "out")[0].prediction) == 100_000


def line(**reply) -> str:
    return json.dumps({"mode": "seeing", "id": "a", "source": 0, "image": "x", **reply})


def test_two_answers_to_one_item_are_an_error_and_a_second_try_is_not(tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "1.jsonl").write_text(line(error="no image") + "\n")
    (parts / "2.jsonl").write_text(line(text="yes") + "\n")
    assert read_parts(tmp_path) == {("seeing", "a", 0, "x"): {"text": "yes"}}
    (parts / "3.jsonl").write_text(line(text="yes") + "\n")
    assert read_parts(tmp_path) == {("seeing", "a", 0, "x"): {"text": "yes"}}
    (parts / "4.jsonl").write_text(line(text="no") + "\n")
    with pytest.raises(WorkflowError, match=r"1 items \(a\) were answered twice"):
        read_parts(tmp_path)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_blind_question_never_keeps_its_image(count):
    order = derangement(count, seed=7)
    assert sorted(order) == list(range(count))
    assert all(i != j for i, j in enumerate(order))


def test_the_other_images_do_not_depend_on_the_order_of_the_items(pope):
    others = blind_images(pope.items, 7)
    assert others == blind_images(pope.items[::-1], 7)
    assert all(others[item.id] != (item.source, item.image) for item in pope.items)
    assert blind_images(pope.items[:4], 7) == {}  # of one image


def test_predictions_that_repeat_or_are_of_no_item(pope, tmp_path):
    file = tmp_path / "said.jsonl"
    file.write_text('{"question_id": "random/1", "answer": "yes"}\n{"id": "random/1", "text": "no"}\n')
    with pytest.raises(WorkflowError, match=r"1 ids \(random/1\) come more than once"):
        read_predictions(file)
    file.write_text('[{"id": "random/1", "answer": "yes"}, {"id": "random/9", "answer": "yes"}]')
    with pytest.raises(WorkflowError, match=r"1 ids \(random/9\) are of no item"):
        score_predictions(pope, read_predictions(file), tmp_path / "out", "said")
    with pytest.raises(Incomplete, match=r"23 of 24 items .* were not answered"):
        score_predictions(pope, {"random/1": "yes"}, tmp_path / "out", "said")
    file.write_text("{}")
    with pytest.raises(UsageError, match="entry 0: expected an object with id and answer"):
        read_predictions(file)
    assert not (tmp_path / "out").exists()


def test_an_evaluations_folder_changes_with_what_decides_its_answers(pope, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = model_digest(model)
    before = evaluation_folder(tmp_path, pope, weights, 7)
    assert before == evaluation_folder(tmp_path, pope, weights, 7, 128)
    assert before.name.startswith("pope-")
    assert evaluation_folder(tmp_path, pope, weights, 8) != before != evaluation_folder(tmp_path, pope, weights, 7, 16)
    (model / "model.safetensors").write_bytes(b"weights")
    assert model_digest(model) != weights
    assert evaluation_folder(tmp_path, pope, model_digest(model), 7) != before


def test_a_prepared_data_set_gives_its_questions_back(tmp_path):
    write_packed_set(tmp_path / "set", {"train": 3, "validation": 7})
    shards = open_benchmark("shards", str(tmp_path / "set"))
    expected = [
        (f"{'captions' if i % 2 else 'talk'}/validation-{i}/{t}", turns_of(i)[2 * t : 2 * t + 2])
        for i in range(7)
        for t in (0, 1)
    ]
    assert [item.id for item in shards.items] == [key for key, _ in expected]
    assert [(item.question, item.answer) for item in shards.items] == [(q.text, a.text) for _, (q, a) in expected]
    assert shards.counts() == {"overall": 14, "talk": 8, "captions": 6}
    for item in shards.items:
        number = int(item.id.split("/")[1].split("-")[1])
        if number % 3 == 1:
            assert open_store(shards.stores[0]).read(item.image) == image_of(number)
    assert set(shards.missing) == {
        f"{'captions' if i % 2 else 'talk'}/validation-{i}/{t}" for i in (2, 5) for t in (0, 1)
    }
    assert len(open_benchmark("shards", str(tmp_path / "set"), split="train").items) == 6
    with pytest.raises(UsageError, match="shards: no manifest"):
        open_benchmark("shards", str(Path(tmp_path)))


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_so_does_one_in_granites_chat_format(tmp_path, system):
    granite_tokenizer().save_pretrained(tmp_path / "granite")
    tokenizer = load_or_train(TokenizerConfig(name=str(tmp_path / "granite"), chat="granite"), ())
    talks = [with_system(turns_of(i), system) for i in range(4)]
    write_packed_set(tmp_path / "set", {"validation": 4}, tokenizer, talks.__getitem__)
    shards = open_benchmark("shards", str(tmp_path / "set"))
    expected = [(q.text, a.text) for talk in talks for q, a in (talk[:2], talk[2:])]
    assert [(item.question, item.answer) for item in shards.items] == expected
    (tmp_path / "set" / "tokenizer" / "tokenizer_config.json").write_text('{"chat_format": "other"}')
    with pytest.raises(UsageError, match="shards: the tokenizer is for the chat format 'other'; known are ml-mamba"):
        open_benchmark("shards", str(tmp_path / "set"))


def test_a_recipes_benchmark_has_a_name_that_there_is(tmp_path):
    with pytest.raises(ValueError, match="'vqav2', 'gqa'"):
        Recipe.model_validate(recipe(tmp_path, evaluate={"benchmarks": [{"name": "mmlu", "data": "x"}]}))


def test_a_benchmark_that_is_not_there_is_known_before_anything_is_asked(tmp_path):
    write_corpus(tmp_path)
    missing = {"name": "gqa", "data": str(tmp_path / "nothing")}
    content = Recipe.model_validate(recipe(tmp_path, evaluate={"benchmarks": [missing]}))
    with pytest.raises(UsageError, match="there is no folder"):
        evaluate_recipe(content, tmp_path / "evaluation", tmp_path, Console(), None)
    assert not (tmp_path / "evaluation").exists()
