"""A data set read back: every kind of damage to its files or its manifest is found and named."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from pipelines.config import DataConfig
from pipelines.finished import fingerprints
from pipelines.manifest import MANIFEST_FILE, Manifest
from pipelines.verify import verify
from tests.helpers.packed_set import write_packed_set

SHARD = "shards/train-00001.arrow"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "good"
    write_packed_set(folder, {"train": 20, "validation": 5})
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(good, tmp_path / "set")


def edit(folder: Path, *path, value) -> None:
    """Change one value of manifest.json; the digest is made right again, so that only the value is wrong."""
    file = folder / MANIFEST_FILE
    content = json.loads(file.read_text())
    node = content
    for key in path[:-1]:
        node = node[key]
    assert node[path[-1]] != value
    node[path[-1]] = value
    manifest = Manifest(**content)
    file.write_text(manifest.model_copy(update={"digest": manifest.content_digest()}).model_dump_json())


def test_a_whole_set_has_no_problems(good):
    events = []
    assert verify(str(good), events.append) == []
    assert [(event.done, event.total) for event in events][-1] == (5, 5)


def test_one_flipped_bit_anywhere_in_a_shard(folder):
    shard = folder / SHARD
    data = bytearray(shard.read_bytes())
    for place in (0, len(data) // 3, len(data) - 1):
        data[place] ^= 1
        shard.write_bytes(data)
        data[place] ^= 1
        (problem,) = verify(str(folder))
        assert problem.startswith(f"{SHARD} has other content: its sha256 is ")


def test_a_shard_that_is_cut_off_too_long_or_missing(folder):
    shard, size = folder / SHARD, (folder / SHARD).stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    assert verify(str(folder)) == [f"{SHARD} is cut off: it has {size - 1} bytes, the manifest says {size}"]
    shard.write_bytes(shard.read_bytes() + b"\n\n")
    assert verify(str(folder)) == [f"{SHARD} is too long: it has {size + 1} bytes, the manifest says {size}"]
    shard.unlink()
    assert verify(str(folder)) == [f"{SHARD} is missing"]


def test_a_shard_too_many(folder):
    shutil.copy(folder / SHARD, folder / "shards" / "train-00099.arrow")
    assert verify(str(folder)) == ["shards/train-00099.arrow is not in the manifest"]


def test_two_shards_that_changed_places(folder):
    first, second = folder / "shards/train-00000.arrow", folder / SHARD
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert [problem.split()[0] for problem in verify(str(folder))] == ["shards/train-00000.arrow", SHARD]


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "quarantine.arrow"])
def test_the_other_files(folder, name):
    file = folder / name
    file.write_bytes(file.read_bytes()[:-30])
    (problem,) = verify(str(folder))
    assert problem.startswith(f"{name} has sha256" if "tokenizer" in name else f"{name} cannot be read")
    file.unlink()
    assert verify(str(folder)) == [f"{name} is missing"]


@pytest.mark.parametrize("count", ["rows", "samples", "tokens", "loss_tokens", "images"])
def test_a_count_of_a_shard(folder, count):
    edit(folder, "splits", "train", "shards", 1, count, value=1)
    problems = verify(str(folder))
    assert problems[0].startswith(f"manifest.json says {count} = 1 of {SHARD}, which has ")
    assert problems[1].startswith(f"manifest.json says {count} = ")  # the split's sum no longer fits either
    assert "of the train split" in problems[1]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["splits", "train", "samples"], 21, "says samples = 21 of the train split, its parts give 20"),
        (["splits", "train", "fill"], 0.99, "says fill = 0.99 of the train split, its parts give 0."),
        (["splits", "train", "samples_by_source"], {"talk": 20}, "says samples_by_source = {'talk': 20}"),
        (
            ["splits", "train", "shards", 0, "samples_by_source"],
            {"x": 6},
            "says samples_by_source = {'x': 6} of shards",
        ),
        (["splits", "train", "quarantined", "empty_turn"], 7, "'empty_turn': 7"),
        (["splits", "train", "records"], 24, "says records = 24 of the train split, its parts give 23"),
        (["splits", "train", "quarantined_by_source", "talk"], {"empty_turn": 2}, "'talk': {'empty_turn': 2}"),
        (["max_tokens"], 100, "the manifest says max_tokens 100"),
        (["tokens_per_image"], 3, "the manifest says tokens_per_image 3"),
    ],
)
def test_other_numbers_of_the_manifest(folder, path, value, message):
    edit(folder, *path, value=value)
    assert any(message in problem for problem in verify(str(folder))), verify(str(folder))


def test_a_digest_that_is_not_that_of_the_shards(folder):
    manifest = Manifest.load(str(folder))
    manifest.model_copy(update={"digest": "0" * 64}).save(str(folder))
    assert verify(str(folder)) == [f"manifest.json has digest {'0' * 64}, its shards give {manifest.digest}"]


def test_a_shard_taken_out_of_the_manifest(folder):
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["splits"]["train"]["shards"].pop()
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    problems = " ".join(verify(str(folder)))
    assert "train-00003.arrow is not in the manifest" in problems
    assert "manifest.json has digest" in problems


def test_a_flipped_byte_in_the_quarantine(folder):
    file = folder / "quarantine.arrow"
    good = file.read_bytes()
    sha256 = hashlib.sha256(good).hexdigest()
    manifest = Manifest.load(str(folder)).model_copy(update={"quarantine_sha256": sha256})
    manifest.save(str(folder))
    assert verify(str(folder)) == []
    at = good.index(b"no file 0.png")  # no count and no reason changes
    file.write_bytes(good[:at] + b"NO" + good[at + 2 :])
    (problem,) = verify(str(folder))
    assert problem.startswith("quarantine.arrow has other content: its sha256 is ")


def test_a_source_that_has_changed_since(folder, tmp_path):
    (tmp_path / "train.json").write_text("[]")
    source = {"type": "llava", "annotations": str(tmp_path / "train.json"), "images": str(tmp_path)}
    config = DataConfig(train=[source], tokenizer={"train_vocab_size": 300}, max_tokens=400)
    Manifest.load(str(folder)).model_copy(update={"sources": fingerprints(config)}).save(str(folder))
    assert verify(str(folder), config=config) == []
    (tmp_path / "train.json").write_text("[ ]")
    assert verify(str(folder), config=config) == [
        "the source train/llava has changed since the data set was made from it"
    ]
