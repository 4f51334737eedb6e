"""Files at a path or URI: whole or not at all, on a local disk and in a store that is not one."""

import hashlib

import pyarrow as pa
import pytest
from pyarrow import fs

from pipelines import storage


@pytest.fixture(params=["local", "store"])
def root(request, tmp_path, monkeypatch):
    """A folder, as a local path and as the URI of a file system that pyarrow does not take for a local disk."""
    if request.param == "local":
        return str(tmp_path / "folder")
    (tmp_path / "bucket").mkdir()
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "open_fs", lambda uri: (store, uri.removeprefix("store://")))
    return "store://bucket"


def test_write_then_read(root):
    uri = storage.join(root, "a.bin")
    assert not storage.exists(uri)
    assert storage.size(uri) is None
    assert storage.list_names(storage.join(root, "none")) == []
    storage.write_atomic(uri, b"first")
    storage.write_atomic(uri, b"second")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"second"
    assert storage.size(uri) == 6
    assert storage.checksum(uri) == (6, hashlib.sha256(b"second").hexdigest())
    assert storage.list_names(root) == ["a.bin"]
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(root):
    uri = storage.join(root, "a.bin")
    storage.write_atomic(uri, b"old")

    def fail():
        with storage.atomic_file(uri) as path, open(path, "wb") as file:
            file.write(b"half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(root) == ["a.bin"]


def test_arrow_tables(root):
    uri = storage.join(root, "t.arrow")
    table = pa.table({"a": [1, 2, 3]})
    storage.write_table(uri, table)
    assert storage.open_arrow(uri).read_all().equals(table)
    storage.delete_folder(root)
    assert not storage.exists(uri)


def test_join_keeps_a_query_at_the_end():
    assert storage.join("s3://bucket/set?region=x", "shards", "a") == "s3://bucket/set/shards/a?region=x"
    assert storage.join("s3://bucket", "a") == "s3://bucket/a"
    assert storage.join("/data/set", "a") == "/data/set/a"


def test_an_unknown_scheme_is_named_without_the_password():
    with pytest.raises(ValueError, match="cannot open nope://host/path") as error:
        storage.open_fs("nope://user:secret@host/path")
    assert "secret" not in str(error.value)
    assert storage.shown("/data/a@b/c") == "/data/a@b/c"
