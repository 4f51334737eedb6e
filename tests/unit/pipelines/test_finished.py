"""A finished data set is used again only when it is whole: what is missing or cut off is said, and made again."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from mlmamba.image_colours import PIXELS
from pipelines.config import DataConfig
from pipelines.finished import changed_sources, damage, find_finished, fingerprints
from pipelines.manifest import Manifest
from tests.helpers.packed_set import write_packed_set

SHARD = "shards/train-00001.arrow"


def config_of(folder: Path) -> DataConfig:
    sources = [{"type": "llava", "annotations": str(folder.parent / "train.json"), "images": str(folder.parent)}]
    return DataConfig(train=sources, tokenizer={"train_vocab_size": 300}, max_tokens=400)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a data set, and the corpus that it pretends to be of beside it."""
    folder = tmp_path_factory.mktemp("sets") / "good"
    (folder.parent / "train.json").write_text(json.dumps([{"id": "a", "conversations": []}]))
    manifest = write_packed_set(folder, {"train": 20, "validation": 5})
    manifest = manifest.model_copy(update={"sources": fingerprints(config_of(folder)), "pixels": PIXELS})
    manifest.save(str(folder))
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copy(made.parent / "train.json", tmp_path)
    return shutil.copytree(made, tmp_path / "set")


@pytest.fixture
def said(caplog):
    """What is logged for people."""
    caplog.set_level(logging.WARNING, "mlmamba")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "mlmamba"]


def found(folder: Path) -> Manifest | None:
    return find_finished(config_of(folder), str(folder), "recipe")


def test_a_whole_set_is_used_again_without_a_word(folder, said):
    assert found(folder) == Manifest.load(str(folder))
    assert said() == []
    (folder.parent / "train.json").unlink()
    assert found(folder) == Manifest.load(str(folder))  # its sources may be gone


def test_another_recipe_or_other_records_are_another_set(folder, said):
    assert find_finished(config_of(folder), str(folder), "another") is None
    (folder.parent / "train.json").write_text("[]")
    assert found(folder) is None
    assert said() == []


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


DAMAGE = {
    "a missing shard": (SHARD, Path.unlink, f"{SHARD} is missing"),
    "a shard cut off": (SHARD, cut, f"{SHARD} is cut off: it has "),
    "a shard too long": (SHARD, grow, f"{SHARD} is too long: it has "),
    "a missing tokenizer": ("tokenizer/tokenizer.json", Path.unlink, "tokenizer/tokenizer.json is missing"),
    "another tokenizer": ("tokenizer/tokenizer.json", grow, "tokenizer/tokenizer.json is not the one"),
    "all shards": ("shards", shutil.rmtree, "shards/train-00000.arrow is missing, and 4 more"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_set_that_is_not_whole_is_made_again_and_said_to_be(folder, said, kind):
    name, harm, message = DAMAGE[kind]
    harm(folder / name)
    assert found(folder) is None
    (line,) = said()
    assert line.startswith(f"{folder} is made again: {message}")


@pytest.mark.parametrize("kind", DAMAGE)
def test_where_its_sources_are_gone_the_error_says_what_to_do(folder, kind):
    name, harm, message = DAMAGE[kind]
    harm(folder / name)
    (folder.parent / "train.json").unlink()
    with pytest.raises(ValueError, match=r"is not whole: .*because a source is gone: train/llava .*Put back") as caught:
        found(folder)
    assert message in str(caught.value)
    assert (folder / "manifest.json").exists()  # a copy of the file would make it whole again


def test_only_sizes_are_looked_at(folder):
    data = bytearray((folder / SHARD).read_bytes())
    data[500] ^= 1
    (folder / SHARD).write_bytes(data)
    assert damage(str(folder), Manifest.load(str(folder))) == []


def test_a_set_of_earlier_rules_of_colour_is_used_as_it_is_and_said_to_be_one(folder, said):
    earlier = Manifest.load(str(folder)).model_copy(update={"pixels": 1})
    earlier.save(str(folder))
    assert found(folder) == earlier
    (line,) = said()
    assert line.startswith(f"{folder} was prepared by an earlier version: images in it that are transparent")


def test_sources_that_have_changed(folder):
    config, manifest = config_of(folder), Manifest.load(str(folder))
    assert changed_sources(config, manifest) == []
    (folder.parent / "train.json").write_text("[]")
    assert changed_sources(config, manifest) == [
        "the source train/llava has changed since the data set was made from it"
    ]
    (folder.parent / "train.json").unlink()
    assert changed_sources(config, manifest) == []
