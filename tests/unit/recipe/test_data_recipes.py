"""Data recipes: every shipped one loads, a recipe can name one, and mistakes are named."""

import pytest

from workflows.errors import UsageError
from workflows.recipe.load import RECIPES, load_any, load_recipe
from workflows.recipe.schema import DataRecipe
from workflows.storage.folder import Folder
from workflows.storage.layout import data_folder, layout_of

SHIPPED = sorted((RECIPES / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_data_recipe_loads(path):
    recipe = load_any(f"data/{path.stem}")
    assert isinstance(recipe, DataRecipe)
    assert recipe.name == path.stem
    assert recipe == load_any(str(path))


def test_the_mixture_has_the_sources_of_the_single_recipes():
    single = [load_any(f"data/{name}").data.train for name in ("llava-665k", "lvis-instruct4v", "lrv-instruct")]
    assert load_any("data/llava-lvis-lrv").data.train == [source for sources in single for source in sources]


def test_a_recipe_that_names_a_data_recipe_shares_its_folder():
    paper, storage = load_recipe("paper"), Folder("storage")
    folders = layout_of(paper, storage, 729).data
    for stage, name in (("connector", "llava-558k"), ("full", "llava-665k")):
        recipe = load_any(f"data/{name}")
        assert folders[stage] == data_folder(storage, recipe.data, recipe.name, recipe.tokens_per_image, recipe.seed)
        assert folders[stage].name.startswith(f"{name}-")
    assert layout_of(paper, storage, 196).data["full"] != folders["full"]


def test_overrides_reach_into_a_named_data_set_and_can_name_one():
    recipe = load_recipe("paper", ["data.train.0.limit=5", "train.stages.0.data.max_tokens=2048"])
    assert recipe.data.train[0].limit == 5
    assert recipe.train.stages[0].data.max_tokens == 2048
    recipe = load_recipe("quickstart", ["data=data/llava-558k"])
    assert recipe.data.train[0].label == recipe.data.name == "llava-558k"


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("quickstart", ["data=data/nowhere"], "cannot read recipe data/nowhere"),
        ("quickstart", ["data=pyproject.toml"], "is not valid YAML"),
        ("data/llava-558k", ["tokens_per_image=0"], "tokens_per_image: tokens of an image is 0; expected a whole"),
        ("data/llava-558k", ["token_per_image=1"], "token_per_image: unknown key; did you mean 'tokens_per_image'?"),
        ("data/llava-558k", ["data.train.0.anotations=x"], "did you mean 'annotations'?"),
    ],
)
def test_mistakes_are_named(name, overrides, message):
    with pytest.raises(UsageError) as error:
        load_any(name, overrides)
    assert message in str(error.value)


def test_a_data_recipe_cannot_be_run():
    with pytest.raises(UsageError, match="describes a data set only, which mlmamba prepare makes"):
        load_recipe("data/llava-558k")
