"""What decides a result is said beside the fields: what a mark leaves out, and the digests that folders have."""

from typing import Annotated

import pytest
from pydantic import Field

from pipelines.config import DataConfig, data_identity
from pipelines.identity import Decides, StrictModel, digest, identity
from workflows.recipe.load import load_recipe
from workflows.storage.folder import Folder
from workflows.storage.layout import data_folder, earlier_data_folder, run_name
from workflows.train.trainer import stage_digest

SOURCE = {"type": "llava", "annotations": "train.json", "images": "images"}


class Inner(StrictModel):
    size: int = 1
    speed: Annotated[int, Decides.NOTHING] = 1


class Outer(StrictModel):
    inner: Inner = Inner()
    several: list[Inner] = Field(default=[Inner()])
    name: Annotated[str, Decides.RUN] = "a"
    later: Annotated[float, Decides.WHEN_SET] = 0.9


def data(**fields) -> DataConfig:
    base = {"train": [SOURCE], "tokenizer": {"train_vocab_size": 300}, "max_tokens": 256}
    return DataConfig.model_validate(base | fields)


def test_marks_reach_into_nested_models_and_lists():
    assert identity(Outer()) == {"inner": {"size": 1}, "several": [{"size": 1}], "name": "a"}
    assert identity(Outer(), Decides.RUN) == {"inner": {"size": 1}, "several": [{"size": 1}]}
    assert identity(Outer(several=[Inner(speed=5)])) == identity(Outer())


def test_a_later_field_decides_once_it_is_set():
    assert identity(Outer(later=0.9)) == identity(Outer())
    assert identity(Outer(later=0.95))["later"] == 0.95


@pytest.mark.parametrize("change", [{"name": "b"}, {"partition_records": 7}, {"max_quarantined": 0.5}])
def test_what_changes_no_shard_keeps_the_data_sets_identity(change):
    assert data_identity(data(**change), 9, 7) == data_identity(data(), 9, 7)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 128},
        {"deduplicate": False},
        {"exclude_images_of": [SOURCE]},
        {"images": {"formats": ["PNG", "TIFF"]}},
        {"images": {"max_pixels": 1_000_000}},
        {"images": {"max_aspect": 4}},
    ],
)
def test_what_changes_shards_makes_another_data_set(change):
    assert data_identity(data(**change), 9, 7) != data_identity(data(), 9, 7)


def test_limits_of_images_that_are_the_defaults_leave_the_identity_as_it_was():
    written_out = {"formats": ["PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF"], "max_pixels": 64_000_000, "max_aspect": 20}
    assert data_identity(data(images=written_out), 9, 7) == data_identity(data(), 9, 7)


def test_test_sources_decide_as_far_as_their_images_are_kept_out():
    tested = {"test": [SOURCE | {"annotations": "test.json"}]}
    assert data_identity(data(**tested), 9, 7) != data_identity(data(), 9, 7)
    off = {"exclude_evaluation_images": False}
    assert data_identity(data(**tested, **off), 9, 7) == data_identity(data(**off), 9, 7)


def test_the_folder_and_the_manifest_have_one_identity():
    first, second = data(), data(test=[SOURCE | {"annotations": "test.json"}])
    folders = [data_folder(Folder("s"), config, "tiny", 9, 7) for config in (first, second)]
    assert [folder.name for folder in folders] == [f"tiny-{data_identity(c, 9, 7)[:10]}" for c in (first, second)]
    assert folders[0] != folders[1]
    assert len({earlier_data_folder(Folder("s"), config, "tiny", 9, 7) for config in (first, second)}) == 1


def test_runs_and_stages_of_version_0_1_keep_their_names():
    """The digests stand in folders that people have: those of the shipped recipe as version 0.1 named them."""
    recipe = load_recipe("quickstart")
    assert run_name(recipe) == "quickstart-8c648b8c2d"
    assert earlier_data_folder(Folder("s"), recipe.data, recipe.name, 16, recipe.seed).name == "quickstart-fd953a41a0"
    assert data_identity(recipe.data, 16, recipe.seed).startswith("f2f51f44c42e1943")
    stages = {"connector": "a", "full": "b"}
    assert [stage_digest(recipe, index, stages) for index in (0, 1)] == ["e91702147d", "bf88dc4bb6"]


def test_a_digest_is_of_the_content_and_not_of_its_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
