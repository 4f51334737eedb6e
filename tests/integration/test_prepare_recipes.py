"""`mlmamba prepare` with the shipped data recipes, each on a small set of the layout in which its data is published."""

import json
import shutil

import pytest

from tests.helpers import published
from workflows.cli import main

# Ray starts here, so that its workers are not in the folder that the recipes' paths are relative to.
pytestmark = pytest.mark.usefixtures("two_cpus")


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Run `mlmamba prepare` in a folder with `data/`, with a small tokenizer. Returns the manifest's train split."""
    monkeypatch.chdir(tmp_path)

    def run(recipe: str, *changes: str) -> dict:
        changes = ["data.tokenizer={train_vocab_size: 300}", *changes]
        sets = [word for change in changes for word in ("--set", change)]
        code = main(["prepare", f"data/{recipe}", "--storage", "storage", "--json", "--verify", *sets])
        assert code == 0
        ((folder, manifest),) = json.loads(capsys.readouterr().out)["data"].items()
        assert folder.startswith(str(tmp_path / "storage" / "data" / recipe))
        assert manifest["tokens_per_image"] == 729
        return manifest["splits"]["train"]

    return run


def test_llava_558k_from_the_zip_and_unpacked(prepare, tmp_path):
    published.write_llava_558k(tmp_path / "data")
    from_zip = prepare("llava-558k")
    assert (from_zip["samples"], from_zip["images"], from_zip["quarantined"]) == (6, 6, {})
    assert from_zip["rows"] == 2  # five images of 729 tokens fill a row
    folder = tmp_path / "data/LLaVA-Pretrain"
    shutil.unpack_archive(folder / "images.zip", folder / "images")
    unpacked = prepare("llava-558k", "data.train.0.images=data/LLaVA-Pretrain/images")
    assert [shard["sha256"] for shard in unpacked["shards"]] == [shard["sha256"] for shard in from_zip["shards"]]


def test_llava_665k(prepare, tmp_path):
    published.write_llava_665k(tmp_path / "data")
    split = prepare("llava-665k", "data.max_quarantined=0.3")
    assert split["quarantined"] == {"image_truncated": 1, "role_order": 1}
    assert (split["records"], split["samples"], split["images"]) == (9, 7, 6)


def test_lvis_instruct4v(prepare, tmp_path):
    published.write_lvis_instruct4v(tmp_path / "data")
    split = prepare("lvis-instruct4v")
    assert (split["samples"], split["images"], split["quarantined"]) == (4, 4, {})


def test_lrv_instruct(prepare, tmp_path):
    published.write_lrv_instruct(tmp_path / "data")
    split = prepare("lrv-instruct")
    assert split["samples_by_source"] == {"lrv": 4, "lrv-chart": 2, "lrv-more": 3}
    assert split["quarantined_by_source"] == {"lrv-more": {"duplicate_content": 1}}  # asked in both lists


def test_the_mixture(prepare, tmp_path):
    for write in (published.write_llava_665k, published.write_lvis_instruct4v, published.write_lrv_instruct):
        write(tmp_path / "data")
    split = prepare("llava-lvis-lrv", "data.max_quarantined=0.3", "data.train.2.weight=2", "data.train.1.weight=0.5")
    kept = {"llava-665k": 7, "lvis-instruct4v": 2, "lrv": 8, "lrv-more": 3, "lrv-chart": 2}
    assert split["samples_by_source"] == dict(sorted(kept.items()))
