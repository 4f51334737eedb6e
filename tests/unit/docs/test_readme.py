"""The README is short, its drawing names what is in the code, and the images of the pages are small.

The drawing says what it means by the form of each word: `mlmamba VERB`, a path of the repository, a file that a step
leaves, a stage of the quickstart, `models:/NAME@ALIAS`, a path of the HTTP interface.
"""

import ast
import re
from functools import cache

import pytest
from PIL import Image

from tests.helpers.documents import ROOT, blocks, links, pages
from workflows.cli import parse
from workflows.recipe.evaluate import RegisterRecipe
from workflows.recipe.load import load_recipe

README = ROOT / "README.md"
IMAGES = ROOT / "docs" / "images"
MOST_WORDS = 1200  # code, tables and the drawing included
MOST_BYTES = 300_000


def drawing() -> str:
    (block,) = [block for block in blocks(README) if block.language == "mermaid"]
    return block.text


def labels() -> list[str]:
    """What stands in the boxes and on the arrows, a line each."""
    return [line for label in re.findall(r'"([^"]*)"', drawing()) for line in label.split("<br>")]


def named(pattern: str) -> list[str]:
    found = [name for label in labels() for name in re.findall(pattern, label)]
    assert found, f"the drawing has nothing like {pattern}"
    return found


@cache
def strings() -> set[str]:
    """Every text in quotes in the product."""
    files = [file for package in ("pipelines", "workflows") for file in (ROOT / package).rglob("*.py")]
    trees = [ast.walk(ast.parse(file.read_text())) for file in files]
    return {node.value for tree in trees for node in tree if isinstance(node, ast.Constant)}


def test_the_readme_is_short():
    assert len(README.read_text().split()) < MOST_WORDS


def test_the_verbs_of_the_drawing_are_the_commands():
    for words in named(r"\bmlmamba ([a-z ]+)"):
        with pytest.raises(SystemExit) as ended:
            parse([*words.split(), "--help"])
        assert ended.value.code == 0


def test_the_paths_of_the_drawing_are_there():
    assert not [path for path in named(r"\b(?:mlmamba|pipelines|workflows)/[\w/.]+") if not (ROOT / path).exists()]


def test_the_files_of_the_drawing_are_what_steps_leave():
    assert not set(named(r"\b\w+\.(?:json|arrow|png)\b")) - strings()


def test_the_stages_of_the_drawing_are_the_quickstarts_in_order():
    stages = [stage.name for stage in load_recipe("quickstart", []).train.stages]
    assert named(r"^stage (\w+)$") == stages
    assert [name for name in re.findall(r"(\w+) -- ", drawing()) if name in stages] == stages


def test_the_alias_of_the_drawing_is_the_recipes_default():
    assert named(r"models:/NAME@(\w+)") == [RegisterRecipe.model_fields["alias"].default]


def test_the_address_of_the_drawing_is_served():
    assert not set(named(r"(?<!\w)/v1/[\w/]+")) - strings()


def test_the_arrows_of_the_drawing_follow_the_story():
    """Steps in the order in which workflows/run.py calls them."""
    steps = {
        "prepare_data": "prepare",
        "train_stages": "train",
        "evaluate_model": "evaluate",
        "publish": "models promote",
    }
    source = (ROOT / "workflows" / "run.py").read_text()
    story = source[source.index("def run_workflow") : source.index("def train_only")]
    assert sorted(steps, key=lambda step: story.index(f" {step}(")) == list(steps)
    assert named(r"^mlmamba ([a-z ]+)$")[: len(steps)] == list(steps.values())


def test_the_images_of_the_pages_are_small_and_all_used():
    files = sorted(IMAGES.iterdir())
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    used = {(page.parent / target).resolve() for page in pages() for target in links(page) if target.endswith(".png")}
    assert used == set(files)
    for file in files:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert not image.info.keys() & {"Software", "Author", "Comment"}, f"{file.name} says what made it"
