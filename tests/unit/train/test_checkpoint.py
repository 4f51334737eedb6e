"""Checkpoints in a folder: whole or ignored, dropped only when a newer one is whole. test_storage_s3.py has stores."""

import json
import random

import pytest
import torch

from workflows.storage.folder import WHOLE, Folder
from workflows.train.checkpoint import Checkpoint, CheckpointStore


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(Folder(tmp_path))


def write(store, step, keep=9, workers=2, content=b"state", attempt="a"):
    staging = store.staging(step, attempt)
    staging.mkdir(parents=True)
    for rank in range(workers):
        (staging / f"rank{rank}.pt").write_bytes(content)
        store.publish(staging, rank, [f"rank{rank}.pt"])
    store.complete(staging, Checkpoint(staging, step, workers, 2, "model", 1.5, {}), keep)
    return staging


def steps(store) -> list[int]:
    return [checkpoint.step for checkpoint in store.whole()]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_read_back(store, tmp_path):
    assert store.newest() is None
    folder = write(store, 20)
    assert store.newest() == Checkpoint(folder, 20, 2, 2, "model", 1.5, {"rank0.pt": 5, "rank1.pt": 5})
    assert str(store.newest()) == str(tmp_path / "step-00000020.a")
    assert CheckpointStore(Folder(tmp_path / "nowhere")).newest() is None


def test_it_is_not_there_before_every_rank_has_written(store):
    staging = store.staging(5, "a")
    staging.mkdir()
    (staging / "rank0.pt").write_bytes(b"state")
    assert not store.all_listed(staging, 1)
    store.publish(staging, 0, ["rank0.pt"])
    assert not store.all_listed(staging, 2)
    assert store.all_listed(staging, 1)
    assert store.newest() is None
    store.discard(staging)
    assert not staging.exists()


def test_only_the_newest_are_kept(store, tmp_path):
    for step in (10, 20, 30):
        write(store, step, keep=2)
    assert steps(store) == [20, 30]
    assert names(tmp_path) == ["step-00000020.a", "step-00000030.a"]


def test_a_damaged_one_does_not_count_as_kept_or_found(store):
    write(store, 10, keep=2)
    (write(store, 20, keep=2) / "rank1.pt").write_bytes(b"sta")
    assert store.newest().step == 10
    write(store, 30, keep=2)
    assert steps(store) == [10, 30]


def test_a_marker_that_is_half_written_or_of_another_version_is_ignored(store):
    for step, text in ((10, '{"step": 1'), (20, json.dumps({"step": 20})), (30, "[]")):
        (write(store, step) / WHOLE).write_text(text)
    assert steps(store) == []


def test_a_flipped_bit_is_found_or_changes_nothing(store, tmp_path):
    """Of a thousand places in a file of torch's; those that change nothing lie between its records."""
    state = {"module": {"a": torch.randn(300), "b": torch.arange(50)}, "step": 7}
    torch.save(state, tmp_path / "whole.pt")
    whole, chance, silent = bytearray((tmp_path / "whole.pt").read_bytes()), random.Random(0), 0
    staging = store.staging(10, "a")
    staging.mkdir()
    (staging / "state.pt").write_bytes(whole)
    store.publish(staging, 0, ["state.pt"])
    store.complete(staging, Checkpoint(staging, 10, 1, 2, "model", None, {}), 2)
    found = store.newest()
    assert store.fetch(found, 0, everything=True) == ""
    for _ in range(1000):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        (staging / "state.pt").write_bytes(flipped)
        if said := store.fetch(found, 0, everything=True):
            assert said.startswith("state.pt: ")
            continue
        silent += 1
        try:
            loaded = torch.load(staging / "state.pt", weights_only=True)
        except (RuntimeError, UnicodeDecodeError):  # a record's name, which is no content
            continue
        assert torch.equal(loaded["module"]["a"], state["module"]["a"])
        assert torch.equal(loaded["module"]["b"], state["module"]["b"])
    assert silent < 700
    store.reject(found)
    assert store.newest() is None


@pytest.mark.parametrize("content", [b"", b"state", b"PK\x03\x04" + b"\x00" * 100, b"PK\x05\x06" + b"\xff" * 18])
def test_what_is_no_file_of_torch_is_named(store, content):
    write(store, 10, content=content)
    assert "rank0.pt: it is no file of torch's any more" in store.fetch(store.newest(), 0, everything=True)


def test_two_attempts_at_one_step_do_not_meet(store):
    """What a process that was believed dead completes is as good."""
    zombie = write(store, 10, attempt="zombie")
    mine = write(store, 10, attempt="b", content=b"other")
    assert [checkpoint.folder for checkpoint in store.whole()] == [mine, zombie]
    (zombie / "rank0.pt").unlink()
    assert store.newest().folder == mine


def test_one_of_version_0_1_is_found_and_dropped_in_its_turn(store, tmp_path):
    """Its folder was renamed when it was whole, to the step alone."""
    write(store, 10).rename(tmp_path / "step-00000010")
    assert store.newest().folder == tmp_path / "step-00000010"
    store.sweep()
    assert steps(store) == [10]
    write(store, 20, keep=1)
    assert names(tmp_path) == ["step-00000020.a"]


def test_the_sweep_leaves_whole_ones_alone(store, tmp_path):
    write(store, 10)
    (write(store, 20) / "rank0.pt").unlink()
    store.staging(30, "dead").mkdir()
    (tmp_path / ".step-00000040.dead").mkdir()  # half written by version 0.1
    (tmp_path / "notes.txt").write_text("not ours")
    store.sweep()
    assert names(tmp_path) == ["notes.txt", "step-00000010.a"]
