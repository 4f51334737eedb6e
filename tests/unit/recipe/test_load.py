"""Recipes: every shipped one loads, and whatever is wrong with one is named together with what to do."""

import pytest

from workflows.errors import UsageError
from workflows.recipe.evaluate import Gate
from workflows.recipe.load import RECIPES, load_recipe
from workflows.storage.folder import Folder
from workflows.storage.layout import layout_of, open_local_storage, open_storage
from workflows.train.job import stage_digest


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipe_loads(path):
    assert load_recipe(str(path)).name == path.stem


def test_a_shipped_recipe_is_found_by_its_bare_name():
    assert load_recipe("quickstart").name == "quickstart"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stagess=1", "train.stagess: unknown key; did you mean 'stages'?"),
        ("train.stages.0.lerning_rate=1", "did you mean 'learning_rate'?"),
        (
            "data.train.0={type: llava, annotations: a, images: b, image: c}",
            "image: unknown key; did you mean 'images'?",
        ),
        (
            "data.train.0={type: parquet, files: a, caption: b, annotations: c}",
            "annotations: unknown key; remove it. There",
        ),
        ("train.workers=many", "train.workers: give a number above 0, or two of them, [least, most]"),
        ("train.stages.0.learning_rate=-1", "(given: -1)"),
        ("train.stages.0.epochs=2", "give either epochs or steps"),
        ("train.stages.0.batch_rows=3", "batch_rows = 3 does not divide into workers x micro_batch_rows = 2 x 2 = 4"),
        ("train.stages.1.name=connector", "two stages are called 'connector'"),
        ("model.text.head_dim=48", "hidden_size x expand = 256 is not a multiple of head_dim = 48"),
        ("model.connector.name=resampler", "model.connector.name"),
        ("data.train.0.type=parquett", "parquett"),
        ("nonsense", "write it as key.path=value"),
        ("train.stages.7.steps=1", "there is no '7' to go into"),
        ("train.stages.x=1", "cannot set 'x' there"),
    ],
)
def test_a_wrong_override_is_named(override, expected):
    with pytest.raises(UsageError) as error:
        load_recipe("quickstart", [override])
    assert expected in str(error.value)


def test_overrides_are_yaml_and_reach_into_lists():
    recipe = load_recipe("quickstart", ["train.stages.1.epochs=null", "train.stages.1.steps=5", "evaluate.gate={}"])
    assert (recipe.train.stages[1].epochs, recipe.train.stages[1].steps, recipe.evaluate.gate) == (None, 5, Gate())


def test_a_missing_recipe_names_the_shipped_ones():
    with pytest.raises(UsageError, match=r"nowhere\.yaml.*Shipped recipes: cobra, data/.*quickstart"):
        load_recipe("nowhere.yaml")


def test_broken_yaml_and_other_content_are_usage_errors(tmp_path):
    for content in ("a: [", "- 1", ""):
        (tmp_path / "r.yaml").write_text(content)
        with pytest.raises(UsageError, match=r"r\.yaml"):
            load_recipe(str(tmp_path / "r.yaml"))


def test_a_stage_with_its_own_data_needs_one_named_tokenizer():
    with pytest.raises(UsageError, match=r"data\.tokenizer\.name must be set"):
        load_recipe(
            "quickstart",
            ["train.stages.0.data={train: [{type: easy_vqa, split: train}], tokenizer: {train_vocab_size: 512}, "
             "max_tokens: 768}"],
        )  # fmt: skip


def test_stages_of_the_paper_lie_in_two_data_folders(tmp_path):
    data = layout_of(load_recipe("paper"), Folder(tmp_path), 729).data
    assert data["connector"] != data["full"]
    assert len(set(layout_of(load_recipe("quickstart"), Folder(tmp_path), 16).data.values())) == 1


def test_changing_training_keeps_the_data_folder_and_changing_the_gate_keeps_both(tmp_path):
    plain = layout_of(load_recipe("quickstart"), Folder(tmp_path), 16)
    trained = layout_of(load_recipe("quickstart", ["train.stages.1.learning_rate=0.1"]), Folder(tmp_path), 16)
    gated = layout_of(load_recipe("quickstart", ["evaluate.gate={}"]), Folder(tmp_path), 16)
    assert trained.data == plain.data
    assert trained.run != plain.run
    assert gated == plain


def test_a_storage_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="choose another folder"):
        open_storage(str(tmp_path / "file" / "below"))
    with pytest.raises(UsageError, match=r"s3://bucket/x: run, train, prepare and submit keep their work in object"):
        open_local_storage("s3://user:hidden@bucket/x")
    with pytest.raises(UsageError, match=r"cannot write there: .*use a local path, s3:// or gs://"):
        open_storage("wrong://bucket/x")


def test_best_wants_a_validation_split_before_any_work():
    best = ["train.validate_every=5", "train.stages.1.best={patience: 3}"]
    with pytest.raises(UsageError, match=r"best chooses by the validation split, and its data has none: give"):
        load_recipe("quickstart", ["data.validation=[]", *best])
    split = load_recipe("quickstart", ["data.validation=[]", "data.train.0.validation=0.1", *best])
    assert split.train.stages[1].best.patience == 3


def test_how_often_is_measured_decides_where_the_best_step_is_taken_and_nowhere_else():
    def digests(*overrides: str) -> list[str]:
        recipe = load_recipe("quickstart", [*overrides])
        return [stage_digest(recipe, index, {"connector": "a", "full": "a"}) for index in (0, 1)]

    assert digests() == digests("train.validate_every=5")
    best = "train.stages.1.best={}"
    five, six = digests(best, "train.validate_every=5"), digests(best, "train.validate_every=6")
    assert five[0] == six[0] == digests()[0]
    assert len({five[1], six[1], digests()[1]}) == 3
