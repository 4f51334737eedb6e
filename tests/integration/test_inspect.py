"""`mlmamba prepare --verify` and `mlmamba data inspect` on a data set that the command line made."""

import json
from pathlib import Path

import pytest
import ray
from PIL import Image

from tests.helpers.toy_workflow import recipe, write_corpus, write_recipe
from workflows.cli import main


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[str, Path, Path]:
    """A recipe file, the storage folder, and the data set that prepare made of it."""
    root = tmp_path_factory.mktemp("work")
    write_corpus(root)
    file = write_recipe(root / "recipe.yaml", recipe(root))
    ray.shutdown()
    assert main(["prepare", str(file), "--storage", str(root / "storage")]) == 0
    yield str(file), root / "storage", next((root / "storage" / "data").iterdir())
    ray.shutdown()


def test_inspect_prints_the_counts_and_draws_the_sheet(prepared, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["data", "inspect", str(prepared[2]), "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert str(prepared[2]) in out
    assert "image_truncated" in out
    assert out.rstrip().endswith(f"samples: {sheet}")
    with Image.open(sheet) as image:
        assert image.format == "PNG"


def test_inspect_for_machines(prepared, capsys):
    assert main(["data", "inspect", str(prepared[2]), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["splits"]["train"]["samples"] == 47
    assert content["quarantine"][0]["reason"] == "image_truncated"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{folder}/nowhere"], 1, "no manifest.json under"),
        (["{folder}", "--sheet", "{tmp}/x.png", "--split", "test"], 1, "no split 'test', it has train"),
        (["{folder}", "--sheet", "{tmp}/x.png", "--samples", "0"], 2, "--samples 0: draw at least 1"),
        (["{folder}", "--sheet", "{folder}/manifest.json/x.png"], 1, "manifest.json/x.png ([Errno"),
        (["ftp://somebody:secret@host/set"], 1, "cannot open ftp://host/set"),
    ],
)
def test_mistakes_get_a_message(prepared, arguments, code, message, tmp_path, capsys):
    filled = [argument.format(folder=prepared[2], tmp=tmp_path) for argument in arguments]
    assert main(["data", "inspect", *filled]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "secret" not in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_a_flipped_bit_and_says_what_to_do(prepared, capsys):
    file, storage, folder = prepared
    command = ["prepare", file, "--verify", "--storage", str(storage)]
    assert main(command) == 0
    assert "verified: every shard is as the manifest says" in capsys.readouterr().out
    shard = next((folder / "shards").iterdir())
    good = shard.read_bytes()
    shard.write_bytes(good[:500] + bytes([good[500] ^ 4]) + good[501:])
    assert main([*command, "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["data"][str(folder)]["problems"]
    assert problem.startswith(f"shards/{shard.name} has other content")
    assert main(command) == 1
    out = capsys.readouterr().out
    assert problem in out
    assert f"to make it again: delete {folder / 'manifest.json'} and run mlmamba prepare" in out
    (folder / "manifest.json").unlink()
    assert main(command) == 0
    assert shard.read_bytes() == good


def test_a_shard_that_was_deleted_is_made_again_and_said_to_be(prepared, caplog):
    file, storage, folder = prepared
    command = ["prepare", file, "--storage", str(storage)]
    assert main(command) == 0
    before = {shard: shard.read_bytes() for shard in (folder / "shards").iterdir()}
    lost = next(iter(before))
    lost.unlink()
    assert main(command) == 0
    assert f"is made again: shards/{lost.name} is missing" in caplog.text
    assert {shard: shard.read_bytes() for shard in (folder / "shards").iterdir()} == before
