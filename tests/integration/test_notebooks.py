"""Every notebook runs from top to bottom on two cores, says what it is about, and is committed without outputs."""

import json
from pathlib import Path

import pytest

from tests.helpers.documents import ROOT

nbformat = pytest.importorskip("nbformat", reason="the notebooks extra is not installed")
nbclient = pytest.importorskip("nbclient", reason="the notebooks extra is not installed")
pytest.importorskip("ipykernel", reason="the notebooks extra is not installed")

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(notebook: Path, folder: Path, monkeypatch) -> list[dict]:
    """Run a notebook in a folder. Returns its code cells' outputs; an error in a cell is an error here."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    content = nbformat.read(notebook, as_version=4)
    folder.mkdir(exist_ok=True)
    client = nbclient.NotebookClient(content, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(outputs: list[dict]) -> str:
    return "".join(output.get("text", "") for output in outputs)


def images(outputs: list[dict]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(notebook):
    content = json.loads(notebook.read_text())
    nbformat.validate(nbformat.from_dict(content))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert code
    assert not [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_what_it_is_about_and_is_in_the_list(notebook):
    first = json.loads(notebook.read_text())["cells"][0]
    assert first["cell_type"] == "markdown"
    assert first["source"][0].startswith("# ")
    assert f"({notebook.name})" in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_the_scan_connector(tmp_path, monkeypatch):
    outputs = execute(FOLDER / "02-scan-connector.ipynb", tmp_path / "notebooks", monkeypatch)
    assert images(outputs) == 8


@pytest.mark.slow
def test_from_corpus_to_shards(tmp_path, monkeypatch):
    outputs = execute(FOLDER / "01-corpus-to-shards.ipynb", tmp_path / "notebooks", monkeypatch)
    assert images(outputs) == 3
    text = printed(outputs)
    reasons = ("image_truncated", "image_missing", "image_unreadable", "empty_turn", "duplicate_id", "malformed")
    assert not [reason for reason in (*reasons, "contaminated") if reason not in text]
    assert "True" in text.splitlines(), "the digest depends on how the work was cut"


@pytest.mark.slow
def test_train_compare_promote_then_serve_and_ask(tmp_path, monkeypatch):
    """The fourth serves what the third has trained."""
    outputs = execute(FOLDER / "03-train-compare-promote.ipynb", tmp_path / "notebooks", monkeypatch)
    assert images(outputs) == 3
    text = printed(outputs)
    assert "shapes/1 is now @champion" in text
    assert text.count("done before, skipped") == 1  # the second recipe finds the shards of the first
    outputs = execute(FOLDER / "04-serve-and-ask.ipynb", tmp_path / "notebooks", monkeypatch)
    assert images(outputs) == 1
    text = printed(outputs)
    assert '"object": "chat.completion"' in text
    assert "400" in text
    assert "nobody answers any more" in text
