"""`mlmamba evaluate` to the end on a real Ray: intervals, report, comparison and probe; the page in a real browser."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.evaluations import HOSTILE, hostile, vqa_rows, write_evaluation
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.helpers.toy_workflow import write_corpus
from workflows.cli import main
from workflows.evaluate.report import write_report
from workflows.evaluate.results import read_answers, read_scores, write_answers
from workflows.train.initial import save

pytestmark = pytest.mark.usefixtures("two_cpus")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A small corpus in LLaVA's layout, and two models."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.set_num_threads(1)
    write_corpus(root, count=6)
    for name, layers in (("first", 2), ("second", 3)):
        model = tiny_model({"num_hidden_layers": layers}, max_position_embeddings=300)
        save(model, tiny_tokenizer(), root / name)
    return root


def evaluate(root: Path, capsys, *arguments: object) -> tuple[int, dict | None, str]:
    """Exit code, JSON and stderr of the verb."""
    capsys.readouterr()
    code = main(["evaluate", *map(str, arguments), "--storage", str(root / "storage"), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.strip() else None, err


def asked(root: Path) -> list[object]:
    data = ["--benchmark", "llava", "--data", root / "test.json", "--images", root / "test"]
    return [*data, "--max-new-tokens", 4, "--workers", 1]


def test_a_score_comes_with_its_interval_a_report_and_a_comparison(root, capsys):
    code, result, err = evaluate(root, capsys, root / "second", *asked(root), "--compare", root / "first")
    assert code == 0, err
    folder = Path(result["folder"])
    low, high = (result["intervals"][f"overall/{end}"] for end in ("low", "high"))
    assert low <= result["scores"]["overall"] <= high
    assert high > low
    assert read_scores(folder)["intervals"] == result["intervals"]
    page = (folder / "report" / "report.html").read_text()
    assert "second on llava" in page
    assert (folder / "report" / "report-scores.png").read_bytes()[:4] == b"\x89PNG"
    found = result["comparison"]
    assert (found["first"], found["second"], found["items"]) == ("first", "second", 36)
    both = found["scores"]["overall"]
    assert both["second"] == result["scores"]["overall"]
    assert found["difference"]["overall"] == pytest.approx(both["second"] - both["first"])
    assert found["difference"]["overall/low"] <= found["difference"]["overall"] <= found["difference"]["overall/high"]


def test_another_evaluations_folder_can_be_compared_but_not_one_of_other_items(root, capsys):
    _, second, _ = evaluate(root, capsys, root / "second", *asked(root))
    code, result, _ = evaluate(root, capsys, root / "first", *asked(root), "--compare", second["folder"])
    assert code == 0
    assert result["comparison"]["first"] == "second"
    other = root / "other"
    shutil.copytree(second["folder"], other, dirs_exist_ok=True)
    rows = read_answers(other)
    write_answers(other, [replace(rows[0], answers=["violet"]), *rows[1:]])
    code, _, err = evaluate(root, capsys, root / "first", *asked(root), "--compare", other)
    assert code == 2
    assert f"1 items ask something else or have other references ({rows[0].id})" in err


def test_the_probe_writes_its_table_and_its_figure(root, capsys):
    settings = ["--probe", "scaling", "--lengths", 32, 64, "--batches", 1, "--rounds", 1]
    code, result, err = evaluate(root, capsys, root / "first", *settings)
    assert code == 0, err
    assert {Path(file).name for file in result["files"]} == {"scaling.json", "scaling.png", "scaling.txt"}
    assert all(Path(file).stat().st_size for file in result["files"])
    assert {m["model"] for m in result["measurements"]} == {"ML-Mamba", "Transformer"}
    code, _, err = evaluate(root, capsys, root / "first", "--probe", "scaling", "--lengths", 64)
    assert code == 2
    assert "give two lengths or more" in err


@pytest.mark.skipif(BROWSER is None, reason="needs chromium, to open the report")
def test_a_browser_shows_the_report_and_runs_nothing_of_what_answers_say(tmp_path):
    rows = [hostile(row) if number % 2 else row for number, row in enumerate(vqa_rows(images=10))]
    write_evaluation(tmp_path, rows, "gqa", notes=[HOSTILE])
    page = write_report(tmp_path)[0]
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command = [BROWSER, *options, "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>gqa: tiny/1</title>" in shown  # the hostile answers try to change it
    assert "<script" not in shown
    assert shown.count('<img src="data:image/') == page.read_text().count('<img src="data:image/')
    assert "onerror" not in shown.replace("&lt;img src=x onerror=alert(1)&gt;", "")
