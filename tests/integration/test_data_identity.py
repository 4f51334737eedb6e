"""Recipes that differ only in `data.test` have a data set each, and sets that version 0.1 prepared are found."""

import json
import shutil
from pathlib import Path

import pytest

from pipelines.manifest import Manifest
from pipelines.verify import verify
from tests.helpers.toy_workflow import recipe, start, write_corpus, write_recipe
from workflows.cli import main
from workflows.recipe.load import load_recipe
from workflows.storage.folder import Folder
from workflows.storage.layout import earlier_data_folder

TOKENS_PER_IMAGE = 4


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> list[Path]:
    """Two recipes: `second` has no test sources, `first` those of the corpus."""
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root, count=12)
    first = recipe(root)
    second = first | {"data": first["data"] | {"test": []}}
    return [write_recipe(root / f"{name}.yaml", content) for name, content in (("first", first), ("second", second))]


def check(storage: Path) -> None:
    """Two folders, each whole, verified, with a manifest of an identity of its own."""
    folders = sorted(path for path in (storage / "data").iterdir() if path.is_dir())
    manifests = [Manifest.load(str(folder)) for folder in folders]
    assert len(folders) == 2
    assert len({manifest.recipe_digest for manifest in manifests}) == 2
    assert sorted(sorted(manifest.excluded) for manifest in manifests) == [[], ["test/llava"]]
    for folder in folders:
        assert verify(str(folder)) == []


@pytest.mark.usefixtures("two_cpus")
def test_one_after_the_other_both_are_there(recipes, tmp_path, capsys):
    for file in [*recipes, *recipes]:
        assert main(["prepare", str(file), "--storage", str(tmp_path), "--json"]) == 0
    assert capsys.readouterr().err.count("done before, skipped") == 2
    check(tmp_path)


def test_at_the_same_time_both_are_there(recipes, tmp_path):
    processes = [start("prepare", file, "--storage", tmp_path, "--json") for file in recipes]
    outcomes = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    check(tmp_path)


@pytest.mark.usefixtures("two_cpus")
def test_a_set_of_version_0_1_is_found_under_its_new_name_and_one_of_other_test_sources_stays(
    recipes, tmp_path, capsys
):
    loaded = load_recipe(str(recipes[0]))
    earlier = earlier_data_folder(Folder(tmp_path), loaded.data, loaded.name, TOKENS_PER_IMAGE, loaded.seed).local
    assert main(["prepare", str(recipes[0]), "--storage", str(tmp_path), "--json"]) == 0
    ((made, content),) = json.loads(capsys.readouterr().out)["data"].items()
    shutil.move(made, earlier)
    assert main(["prepare", str(recipes[1]), "--storage", str(tmp_path), "--json"]) == 0
    assert "holds a data set with other test sources and stays as it is" in capsys.readouterr().err
    assert earlier.is_dir()
    assert main(["prepare", str(recipes[0]), "--storage", str(tmp_path), "--json"]) == 0
    assert (
        f"prepared by version 0.1 as {earlier.name}, which is now called {Path(made).name}" in capsys.readouterr().err
    )
    assert not earlier.exists()
    assert Manifest.load(made).digest == content["digest"]
    check(tmp_path)
