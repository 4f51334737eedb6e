"""Checkpoint folders: whole or ignored, pruned only when a newer one is whole."""

import json

from workflows.train.checkpoint import (
    COMPLETE,
    Checkpoint,
    all_listed,
    complete,
    folder_name,
    list_files,
    newest,
    partial_folder,
    sweep,
    whole_checkpoints,
)


def write(root, step, keep=9, workers=2, content=b"state", attempt="a"):
    partial = partial_folder(root, step, attempt)
    partial.mkdir(parents=True)
    for rank in range(workers):
        (partial / f"rank{rank}.pt").write_bytes(content)
        list_files(partial, rank, [f"rank{rank}.pt"])
    complete(partial, Checkpoint(root / folder_name(step), step, workers, 2, "model", 1.5, {}), keep)


def steps(root) -> list[int]:
    return [checkpoint.step for checkpoint in whole_checkpoints(root)]


def test_what_was_written_is_read_back(tmp_path):
    write(tmp_path, 20)
    found = newest(tmp_path)
    assert found == Checkpoint(tmp_path / "step-00000020", 20, 2, 2, "model", 1.5, {"rank0.pt": 5, "rank1.pt": 5})
    assert newest(tmp_path / "nowhere") is None


def test_it_is_not_there_before_every_rank_has_written(tmp_path):
    partial = partial_folder(tmp_path, 5, "a")
    partial.mkdir()
    (partial / "rank0.pt").write_bytes(b"state")
    list_files(partial, 0, ["rank0.pt"])
    assert not all_listed(partial, 2)
    assert all_listed(partial, 1)
    assert newest(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step, keep=2)
    assert steps(tmp_path) == [20, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]


def test_a_damaged_one_does_not_count_as_kept_or_found(tmp_path):
    write(tmp_path, 10, keep=2)
    write(tmp_path, 20, keep=2)
    (tmp_path / "step-00000020" / "rank1.pt").write_bytes(b"sta")
    assert newest(tmp_path).step == 10
    write(tmp_path, 30, keep=2)
    assert steps(tmp_path) == [10, 30]


def test_a_marker_that_is_half_written_or_of_another_version_is_ignored(tmp_path):
    for step, text in ((10, '{"step": 1'), (20, json.dumps({"step": 20})), (30, "[]")):
        write(tmp_path, step)
        (tmp_path / folder_name(step) / COMPLETE).write_text(text)
    assert steps(tmp_path) == []


def test_two_attempts_at_one_step_do_not_meet(tmp_path):
    """What a process that was believed dead completes is as good, and stays."""
    write(tmp_path, 10, attempt="zombie")
    before = (tmp_path / "step-00000010" / "rank0.pt").stat().st_ino
    write(tmp_path, 10, attempt="b")
    assert (tmp_path / "step-00000010" / "rank0.pt").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 10)
    (tmp_path / "step-00000010" / "rank0.pt").unlink()
    write(tmp_path, 10, attempt="b")
    assert steps(tmp_path) == [10]


def test_the_sweep_leaves_whole_ones_alone(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 20)
    (tmp_path / "step-00000020" / "rank0.pt").unlink()
    partial_folder(tmp_path, 30, "dead").mkdir()
    (tmp_path / "notes.txt").write_text("not ours")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000010"]
