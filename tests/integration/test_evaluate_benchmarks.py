"""Benchmarks asked of a tiny model by Ray Data workers: the same score however it is spread, whole or not at all."""

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from mlmamba.processing import MLMambaProcessor
from tests.helpers.published_benchmarks import write_gqa, write_pope, write_vsr
from tests.helpers.tiny import PER_IMAGE, SIDE, tiny_model, tiny_tokenizer
from tests.helpers.toy_workflow import recipe, write_corpus, write_recipe
from workflows.cli import main
from workflows.console import Console
from workflows.evaluate import run as evaluation
from workflows.evaluate.benchmarks import Benchmark, open_benchmark, own_data
from workflows.evaluate.collect import Workers
from workflows.evaluate.questions import load_questions
from workflows.evaluate.results import Answered, read_answers
from workflows.evaluate.run import evaluate_benchmark, evaluate_recipe, finish, log_to_version
from workflows.evaluate.scoring import Incomplete
from workflows.recipe.schema import Recipe
from workflows.tracking.tracker import Tracker, connect

pytestmark = pytest.mark.usefixtures("two_cpus")
TOKENS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=200).save_pretrained(path)
    processor = MLMambaProcessor(tiny_tokenizer(), image_size=SIDE, tokens_per_image=PER_IMAGE, max_length=200)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pope(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pope")
    write_pope(root, images=4, per_image=2)
    return root


def read_pope(root: Path) -> Benchmark:
    return open_benchmark("pope", str(root), questions=24)


def ask(benchmark: Benchmark, model: Path, out: Path, how: Workers | None = None, **options) -> dict:
    return evaluate_benchmark(benchmark, model, out, how or Workers(workers=2), max_new_tokens=TOKENS, **options)


@pytest.fixture(scope="module")
def undisturbed(pope, model, tmp_path_factory) -> tuple[dict, list[Answered]]:
    """Scores and answers of an evaluation that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    result = ask(read_pope(pope), model, out, Workers(workers=2, batch_images=2))
    return result, read_answers(out)


def answers(rows: list[Answered]) -> dict[str, tuple]:
    """What decides the score, by id."""
    return {r.id: (r.prediction, r.blind_prediction, r.score, r.blind_score, r.blind_image) for r in rows}


def test_the_score_does_not_depend_on_batches_workers_or_order(undisturbed, pope, model, tmp_path):
    result, rows = undisturbed
    assert len({row.p_yes for row in rows}) > 4  # the model tells images and questions apart
    turned = read_pope(pope)
    turned.items.reverse()
    others = {
        "alone": (read_pope(pope), Workers(workers=1, batch_images=1, batch_questions=1)),
        "turned": (turned, Workers(workers=2, batch_images=3, batch_questions=2)),
    }
    for name, (benchmark, how) in others.items():
        again = ask(benchmark, model, tmp_path / name, how)
        for part in ("scores", "blind", "majority"):
            assert again[part] == pytest.approx(result[part], abs=1e-6)
        found = read_answers(tmp_path / name)
        assert answers(found) == answers(rows)
        chances = {row.id: row.p_yes for row in found}
        assert chances == pytest.approx({row.id: row.p_yes for row in rows}, abs=1e-4)


def test_a_stopped_evaluation_goes_on_with_what_it_has_not_asked(undisturbed, pope, model, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(read_pope(pope), model, tmp_path, Workers(batch_images=1), on_progress=stop)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "parts").glob("*.jsonl")}
    assert 3 <= len(before) < 8
    assert not (tmp_path / "scores.json").exists()
    seen = []
    result = ask(
        read_pope(pope),
        model,
        tmp_path,
        Workers(workers=2, batch_images=4),
        on_progress=lambda done, total: seen.append((done, total, _times(tmp_path, before))),
    )
    assert seen[0][1] <= 2  # what is left of either mode, in batches of four images
    assert all(times == before for _, _, times in seen)  # nothing was asked again
    assert result["scores"] == pytest.approx(undisturbed[0]["scores"])
    assert answers(read_answers(tmp_path)) == answers(undisturbed[1])
    assert not (tmp_path / "parts").exists()
    assert ask(read_pope(pope), Path("no model is needed any more"), tmp_path) == result


def _times(folder: Path, names: dict[str, int]) -> dict[str, int]:
    return {name: (folder / "parts" / name).stat().st_mtime_ns for name in names}


def test_images_that_cannot_be_used_leave_no_score_until_they_are_mended(model, tmp_path):
    count = write_gqa(tmp_path / "gqa")
    damaged = tmp_path / "gqa/images/n101.jpg"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])

    def read() -> Benchmark:
        return open_benchmark("gqa", str(tmp_path / "gqa"), questions=count)

    with pytest.raises(
        Incomplete,
        match=r"no score, 8 of 12 items .* were not answered: image n101.jpg: the JPEG data is damaged.* \(8\)",
    ):
        ask(read(), model, tmp_path / "out")  # those of other images were to be asked blind with this one
    partial = ask(read(), model, tmp_path / "out", allow_partial=True)
    assert not partial["complete"]
    assert 0 < partial["questions"]["overall"] < count
    damaged.unlink()
    with pytest.raises(Incomplete, match=r"4 of 12 items .* cannot be asked: there is no image n101.jpg \(4\)"):
        ask(read(), model, tmp_path / "out")
    damaged.write_bytes(whole)
    result = ask(read(), model, tmp_path / "out")
    assert result["complete"]
    assert result["questions"]["overall"] == count


def run(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    code = main(["evaluate", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command_scores_a_benchmark_and_says_what_is_missing(model, tmp_path, capsys):
    count = write_vsr(tmp_path / "vsr")
    asked = (model, "--benchmark", "vsr", "--data", tmp_path / "vsr", "--storage", tmp_path, "--max-new-tokens", TOKENS)
    code, out, err = run(capsys, *asked)
    assert (code, out) == (2, "")
    assert "the published ones 1,222" in err
    asked = (*asked, "--questions", count)
    code, out, err = run(capsys, *asked, "--workers", "2")
    assert code == 0, err
    assert out.splitlines()[1].split()[:2] == ["overall", "6"]
    assert "always_true" in out
    assert "PARTIAL" not in out
    code, out, err = run(capsys, *asked, "--json", "--batch-images", "1")
    assert code == 0, err
    assert "batches" not in err  # done before
    result = json.loads(out)
    assert result["intervals"]["overall/low"] <= result["scores"]["overall"] <= result["intervals"]["overall/high"]
    assert list((Path(result["folder"]) / "report").glob("*.html"))
    (tmp_path / "vsr/images/000000050404.jpg").unlink()
    code, out, err = run(capsys, *asked)
    assert (code, out) == (1, "")
    assert "2 of 6 items (zeroshot/2, zeroshot/3) cannot be asked: there is no image 000000050404.jpg (2)" in err
    code, out, err = run(capsys, *asked, "--allow-partial")
    assert code == 0, err
    assert "PARTIAL: 2 items are missing (zeroshot/2, zeroshot/3" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --benchmark NAME --data DIR"),
        (("--benchmark", "gqa"), "--benchmark gqa needs --data DIR"),
        (("--recipe", "quickstart", "--data", "x"), "--data goes with --benchmark"),
        (("--benchmark", "gqa", "--data", "no-such-folder"), "there is no folder"),
        (("--benchmark", "mmlu", "--data", "."), "no benchmark 'mmlu'; choose one of vqav2"),
        (("--benchmark", "gqa", "--data", ".", "--predictions", "x.json"), "give a MODEL to ask, or --predictions"),
        (("--benchmark", "gqa", "--data", ".", "--workers", "0"), "--workers is 0; expected at least 1"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message, tmp_path, capsys):
    code, _, err = run(capsys, "model", *arguments, "--storage", tmp_path)
    assert code == 2
    assert message in err


def test_the_test_sources_of_a_recipe(model, tmp_path, capsys):
    write_corpus(tmp_path)
    file = write_recipe(tmp_path / "tiny.yaml", recipe(tmp_path))
    code, out, err = run(capsys, model, "--recipe", file, "--storage", tmp_path / "storage", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["questions"] == {"overall": 36, "all": 36}
    assert result["majority"]["overall"] == pytest.approx(1 / 3)
    assert result["blind"].keys() == {"overall", "all"}


def test_answers_made_elsewhere(pope, tmp_path, capsys):
    file = tmp_path / "said.json"
    file.write_text(json.dumps([{"id": item.id, "answer": item.answer} for item in read_pope(pope).items]))
    asked = ("--benchmark", "pope", "--data", pope, "--questions", 24, "--storage", tmp_path, "--predictions", file)
    code, out, err = run(capsys, *asked, "--json")
    assert code == 0, err
    assert json.loads(out)["scores"]["text/f1"] == 1.0


def test_scores_are_logged_to_the_version_and_added_to_those_that_promotion_looks_at(
    undisturbed, tmp_path, pope, model
):
    out = tmp_path / "out"
    ask(read_pope(pope), model, out)
    result = finish(out, {})
    connect(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("tiny", artifact_location=(tmp_path / "mlflow").as_uri())
    run_id = client.create_run(experiment).info.run_id
    client.create_registered_model("tiny")
    version = str(client.create_model_version("tiny", model.as_uri(), run_id).version)
    client.set_model_version_tag("tiny", version, "mlmamba.scores", json.dumps({"overall": 0.5}))
    log_to_version(client, "tiny", version, "pope", out, result | {"complete": False})
    assert json.loads(client.get_model_version("tiny", version).tags["mlmamba.scores"]) == {"overall": 0.5}
    log_to_version(client, "tiny", version, "pope", out, result)
    kept = json.loads(client.get_model_version("tiny", version).tags["mlmamba.scores"])
    assert kept["overall"] == 0.5
    assert kept["pope/f1"] == result["scores"]["f1"] == undisturbed[0]["scores"]["f1"]
    assert kept["pope/overall/low"] == result["intervals"]["overall/low"]
    metrics = client.get_run(run_id).data.metrics
    assert metrics["pope/text/f1"] == metrics["pope/partial/text/f1"] == result["scores"]["text/f1"]
    assert metrics["pope/blind/overall"] == result["blind"]["overall"]
    assert "evaluation/pope/scores.json" in {file.path for file in client.list_artifacts(run_id, "evaluation/pope")}


def test_benchmarks_of_a_recipe_are_scored_and_logged_beside_the_test_sources(model, tmp_path, capsys, monkeypatch):
    write_corpus(tmp_path)
    count = write_vsr(tmp_path / "vsr")
    asked = {"name": "vsr", "data": str(tmp_path / "vsr"), "questions": count}
    own = {"name": "llava", "data": str(tmp_path / "test.json"), "images": str(tmp_path / "test")}
    settings = {"max_new_tokens": 3, "batch_images": 4, "workers": 2}
    content = Recipe.model_validate(recipe(tmp_path, evaluate=settings | {"benchmarks": [asked, own]}))
    root = tmp_path / "evaluation"
    tracker = Tracker(tmp_path, content, "tiny-run", tmp_path / "run", print)
    read, listed = [], []

    def counting(file, mode):
        read.append(Path(file).name)
        return Path(file).open(mode)

    monkeypatch.setattr(evaluation, "open", counting, raising=False)
    monkeypatch.setattr(own_data, "load_questions", lambda sources: listed.append(1) or load_questions(sources))
    result = evaluate_recipe(content, root, model, Console(), tracker).result
    tracker.finish("FINISHED")
    assert read.count("model.safetensors") == 1  # to name the evaluations, however many benchmarks there are
    assert listed == [1, 1]  # the recipe's test sources, and the benchmark of a folder's own data
    assert result["questions"]["overall"] == 36
    assert result["scores"]["overall/low"] <= result["scores"]["overall"] <= result["scores"]["overall/high"]
    assert 0 <= result["scores"]["vsr/zeroshot/f1"] <= 1
    assert "vsr/zeroshot/overall/low" in result["scores"]
    logged = tracker.client.get_run(tracker.run_id).data.metrics
    assert logged["test/overall"] == result["scores"]["overall"]
    assert logged["blind/overall"] == result["blind"]["overall"]
    assert logged["vsr/zeroshot/text/overall"] == result["scores"]["vsr/zeroshot/text/overall"]
    files = {file.path for file in tracker.client.list_artifacts(tracker.run_id)}
    assert files >= {"samples.png", "scores.json", "report.html", "evaluation"}
    capsys.readouterr()
    again = evaluate_recipe(content, root, model, Console(), tracker)
    assert again.result == result
    assert "done before, skipped" in capsys.readouterr().err
    assert (read.count("model.safetensors"), len(listed)) == (2, 4)  # as often once more, and nothing is asked
    assert again.example.answer
    assert Path(again.shown["image"]).exists()
