"""A shard is compared with its sha256 before a row of it is read, once on each machine."""

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.manifest import Manifest
from pipelines.reader import PackedDataset
from pipelines.shard_check import ShardCheck, ShardDamaged
from tests.helpers.packed_set import write_packed_set

SHARD = "shards/train-00001.arrow"
FIRST, SECOND = 0, 2  # rows of the first shard and of the second


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    write_packed_set(tmp_path / "set", {"train": 20})
    return tmp_path / "set"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Files that have been read to their end for their sha256."""
    files, checksum = [], storage.checksum
    monkeypatch.setattr(storage, "checksum", lambda uri: files.append(Path(uri).name) or checksum(uri))
    return files


def flip(file: Path) -> None:
    """One bit, in a row's tokens."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_is_found_before_its_row_is_read(folder):
    flip(folder / SHARD)
    dataset = PackedDataset(str(folder), check=True)
    assert dataset[FIRST].sample_ids
    for _ in range(2):  # it is not forgotten
        with pytest.raises(ShardDamaged, match=f"{SHARD} has other content: .*delete .*{SHARD} and run again"):
            dataset[SECOND]
    assert PackedDataset(str(folder))[SECOND].sample_ids  # who inspects it may look


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), "is cut off"),
        (lambda file: shutil.copy(file.with_name("train-00000.arrow"), file), "is (cut off|too long)|other content"),
    ],
)
def test_other_damage(folder, harm, message):
    harm(folder / SHARD)
    with pytest.raises(ShardDamaged, match=f"{SHARD} .*({message})"):
        PackedDataset(str(folder), check=True)[SECOND]


def test_each_shard_is_read_for_it_once_however_many_want_it(folder, hashed):
    datasets = [PackedDataset(str(folder), check=True) for _ in range(4)]  # as that many processes have
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: datasets[i % 4][i % 4], range(40)))
    assert sorted(hashed) == ["train-00000.arrow", "train-00001.arrow"]


def test_it_is_compared_again_once_the_file_is_another(folder, hashed):
    check, shard = ShardCheck(str(folder)), Manifest.load(str(folder)).shards[1]
    check.check(shard)
    ShardCheck(str(folder)).check(shard)
    assert len(hashed) == 1
    before = os.stat(folder / SHARD)
    flip(folder / SHARD)
    os.utime(folder / SHARD, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a tool that keeps times does
    with pytest.raises(ShardDamaged):
        check.check(shard)


def test_without_room_for_marks_each_process_compares_for_itself(folder, hashed, tmp_path):
    (tmp_path / "temporary").rmdir()
    (tmp_path / "temporary").write_text("no folder")
    for _ in range(2):
        PackedDataset(str(folder), check=True)[SECOND]
    assert hashed == ["train-00001.arrow"] * 2
