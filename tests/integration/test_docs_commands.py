"""What the pages mark with `<!-- run -->` is run, in a folder of the page's own; and what they tell a contributor to
write works when it is written into a copy of the packages.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.documents import ROOT, Block, blocks, pages

MARKED = [page for page in pages() if any(block.run for block in blocks(page))]
CODE = ("mlmamba", "pipelines", "workflows", "tests", "docs", "pyproject.toml")


def run(block: Block, folder: Path, path: Path = ROOT) -> str:
    """Run a block. Returns what it printed."""
    command = [sys.executable, "-c", block.text] if block.language == "python" else ["bash", "-euc", block.text]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(path),
        "RAY_ADDRESS": "local",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{block.id}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def write(block: Block, folder: Path) -> None:
    """Write the file that a block is the content of."""
    file = folder / block.file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(block.text)


def edit(file: Path, place: str, more: str) -> None:
    """Put a line after the one place that has this text."""
    text = file.read_text()
    assert text.count(place) == 1, f"{file.name} no longer has {place!r} once"
    file.write_text(text.replace(place, place + more))


@pytest.fixture
def copy(tmp_path):
    """A copy of the code that may be changed."""
    for name in CODE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def find(page: str, file: str) -> Block:
    """The block that is the content of a file."""
    return next(block for block in blocks(ROOT / page) if block.file == file)


def _case(page: Path):
    marks = [pytest.mark.slow] if page.name == "own-corpus.md" else []
    return pytest.param(page, marks=marks, id=page.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("page", map(_case, MARKED))
def test_what_a_page_marks_is_run(page, tmp_path):
    if page.name == "CONTRIBUTING.md":
        shutil.copytree(ROOT / "tests" / "benchmarks", tmp_path / "tests" / "benchmarks")
    printed = ""
    for block in blocks(page):
        if block.file:
            write(block, tmp_path)
        elif block.run:
            printed += run(block, tmp_path)
    if page.name == "own-corpus.md":
        assert "verified: every shard is as the manifest says" in printed
        assert (tmp_path / "sheet.png").stat().st_size > 10_000
    if page.name == "CONTRIBUTING.md":
        assert "times a copy" in printed


def test_the_source_of_the_page_reads_records(copy):
    """docs/how-to/add-a-source.md, done in a copy."""
    page = "docs/how-to/add-a-source.md"
    write(find(page, "pipelines/sources/pairs.py"), copy)
    model = next(block for block in blocks(ROOT / page) if block.text.startswith("class PairsSource"))
    config = copy / "pipelines" / "source_config.py"
    text = config.read_text()
    config.write_text(
        text.replace(
            "\nSourceConfig = Annotated[\n    ", f"\n{model.text}\n\nSourceConfig = Annotated[\n    PairsSource | "
        )
    )
    edit(
        copy / "pipelines" / "sources" / "open.py",
        "_READERS = {\n",
        '    "pairs": ("pipelines.sources.pairs", "Pairs"),\n',
    )
    (copy / "pairs").mkdir()
    for name, caption in {"a": "a red square", "b": " "}.items():
        (copy / "pairs" / f"{name}.txt").write_text(caption)
        (copy / "pairs" / f"{name}.jpg").write_bytes(b"image " + name.encode())
    use = Block(
        ROOT / page,
        "python",
        """
from pipelines.config import DataConfig
from pipelines.sources import open_source

config = DataConfig.model_validate({
    "train": [{"type": "pairs", "folder": "pairs"}], "tokenizer": {"name": "x"}, "max_tokens": 9
})
source = open_source(config.train[0])
good, bad = source.records()
assert good.turns[1].text == "a red square" and bad.problem.reason == "empty_turn"
assert source.read_image(good.images[0]) == b"image a"
assert len(source.fingerprint()) == 64
from docs.generate.pages import recipe_page
assert "| `folder` | text | required | Folder of the .jpg and .txt files. |" in recipe_page()
""",
    )
    run(use, copy, copy)


@pytest.mark.slow
def test_the_connector_of_the_page_passes_the_connectors_tests(copy):
    """docs/how-to/add-a-connector.md, done in a copy."""
    page = "docs/how-to/add-a-connector.md"
    write(find(page, "mlmamba/connectors/gated.py"), copy)
    table = copy / "mlmamba" / "connector.py"
    edit(
        table,
        "from mlmamba.connectors.base import Connector\n",
        "from mlmamba.connectors.gated import GatedConnector\n",
    )
    edit(table, '    "ldpv2": LDPv2Connector,\n', '    "gated": GatedConnector,\n')
    names = copy / "workflows" / "recipe" / "model.py"
    edit(names, '"fused_mlp", "ldpv2"', ', "gated"')
    check = (
        "python -m pytest -q -p no:cacheprovider tests/unit/mlmamba/test_connector.py && python -m docs.generate && "
    )
    check += "grep -q gated docs/reference/recipe.md"
    printed = run(Block(ROOT / page, "sh", check), copy, copy)
    assert " passed" in printed
    assert "failed" not in printed
