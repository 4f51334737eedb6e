"""Weight files: every form is read to the same tensors, nothing in them is executed, and what is wrong is named."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from mlmamba.tensor_files import check_tensors, read_checkpoint, read_folder, read_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(7)}


def same(found: dict) -> bool:
    return found.keys() == TENSORS.keys() and all(
        torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in TENSORS.items()
    )


def shards(folder, suffix: str, write) -> None:
    names = [f"part-{i}-of-2.{suffix}" for i in (1, 2)]
    write({"a": TENSORS["a"], "c": TENSORS["c"]}, folder / names[0])
    write({"b": TENSORS["b"]}, folder / names[1])
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1], "c": names[0]}}
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps(index))


def old_format(tensors, file) -> None:
    torch.save(tensors, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "write"),
    [("model.safetensors", save_file), ("pytorch_model.bin", torch.save), ("pytorch_model.bin", old_format)],
    ids=["safetensors", "torch", "torch before 1.6"],
)
def test_a_whole_file(tmp_path, name, write):
    write(TENSORS, tmp_path / name)
    assert same(read_folder(tmp_path))
    assert same(read_tensors(tmp_path / name))


@pytest.mark.parametrize(("suffix", "write"), [("safetensors", save_file), ("bin", torch.save)])
def test_shards(tmp_path, suffix, write):
    shards(tmp_path, suffix, write)
    assert same(read_folder(tmp_path))


def test_safetensors_are_preferred(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert same(read_folder(tmp_path))


def test_a_missing_shard_a_tensor_in_two_and_a_broken_index_are_errors(tmp_path):
    shards(tmp_path, "safetensors", save_file)
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"d": "part-2-of-2.safetensors"}}))
    with pytest.raises(ValueError, match=r"promises 1 tensors that the shards lack, first \['d'\]"):
        read_folder(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="is no index of shards"):
        read_folder(tmp_path)
    index.write_text(json.dumps(whole))
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "part-2-of-2.safetensors")
    with pytest.raises(ValueError, match=r"part-2-of-2.safetensors holds 'a', which an earlier shard holds too"):
        read_folder(tmp_path)
    (tmp_path / "part-2-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-2-of-2.safetensors"):
        read_folder(tmp_path)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no weights: none of model.safetensors, .*pytorch_model.bin.index"
    ):
        read_folder(tmp_path)


class Bomb:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_nothing_in_a_torch_file_is_executed(tmp_path):
    torch.save({"a": Bomb(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot read .*pytorch_model.bin"):
        read_folder(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor, not a dict"),
        ({"a": torch.zeros(3), "epoch": 3}, "is not a dict of tensors: 'epoch' is a int"),
    ],
)
def test_a_torch_file_of_something_else_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_cut_file_is_an_error_that_names_it(tmp_path, name):
    (save_file if name.endswith("safetensors") else torch.save)(TENSORS, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"cannot read .*{name}"):
        read_checkpoint(tmp_path / name)


def test_differences_are_counted_and_the_first_ones_named():
    expected = {name: torch.empty(2, 3, device="meta") for name in "abcdef"}
    found = {"a": torch.zeros(2, 3), "f": torch.zeros(3, 2), "x": torch.zeros(1), "y": torch.zeros(1)}
    message = (
        r"here does not fit: 4 of 6 tensors are missing, first \['b', 'c', 'd'\]; 2 are unexpected, first "
        r"\['x', 'y'\]; 1 of another shape, first f is \(3, 2\), not \(2, 3\)"
    )
    with pytest.raises(ValueError, match=message):
        check_tensors(found, expected, "here")
    check_tensors({name: torch.zeros(2, 3) for name in "abcdef"}, expected, "here")
