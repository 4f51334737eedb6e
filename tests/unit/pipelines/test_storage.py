"""Files at a path or URI: whole or not at all, on a local disk and in a real S3 store."""

import hashlib

import pyarrow as pa
import pytest
from pyarrow import fs

from pipelines import storage
from tests.helpers.s3 import running_s3


@pytest.fixture(scope="module")
def s3():
    with running_s3() as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path, s3):
    """An empty folder, as a local path and as the URI of a store."""
    return str(tmp_path / "folder") if request.param == "local" else s3.uri(tmp_path.name)


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
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)


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


def test_an_upload_that_breaks_off_leaves_no_object(s3, monkeypatch):
    def break_off(source, sink, chunk):
        sink.write(source.read(10))
        raise OSError("the disk is gone")

    monkeypatch.setattr(storage.shutil, "copyfileobj", break_off)
    with pytest.raises(OSError, match="the disk is gone"):
        storage.write_atomic(s3.uri("broken/a.bin"), b"x" * 100)
    assert not storage.exists(s3.uri("broken/a.bin"))


def test_a_file_over_the_limit_is_not_read(root):
    uri = storage.join(root, "a.bin")
    storage.write_atomic(uri, b"12345")
    filesystem, path = storage.open_fs(uri)
    assert storage.read_path(filesystem, path, limit=5) == b"12345"
    with pytest.raises(storage.TooLarge, match="5 bytes, over the limit of 4"):
        storage.read_path(filesystem, path, limit=4)


def test_arrow_tables(root):
    uri = storage.join(root, "t.arrow")
    table = pa.table({"a": [1, 2, 3], "b": ["x", "y", "z"]})
    storage.write_table(uri, table)
    assert storage.open_arrow(uri).read_all().equals(table)
    assert storage.open_arrow(uri, ["b"]).read_all().equals(table.select(["b"]))
    storage.delete_folder(root)
    assert not storage.exists(uri)


def test_a_bucket_is_opened_once(s3):
    first, path = storage.open_fs(s3.uri("a/b.txt"))
    assert storage.open_fs(s3.uri("d"))[0] is first
    assert isinstance(first, fs.S3FileSystem)
    assert (first, path) == fs.FileSystem.from_uri(s3.uri("a/b.txt"))
    for name in ("a%20b/", "", "x/"):
        assert storage.open_fs(s3.uri(name))[1] == fs.FileSystem.from_uri(s3.uri(name))[1]
    assert storage.open_fs(s3.uri("a b"))[1] == "bucket/a b"


def test_the_endpoint_may_come_from_the_environment(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    storage.write_atomic("s3://bucket/env/a.bin?region=us-east-1", b"here")
    assert storage.read_bytes(s3.uri("env/a.bin")) == b"here"


def test_join_keeps_a_query_at_the_end():
    assert storage.join("s3://bucket/set?region=x", "shards", "a") == "s3://bucket/set/shards/a?region=x"
    assert storage.join("s3://bucket", "a") == "s3://bucket/a"
    assert storage.join("/data/set", "a") == "/data/set/a"


@pytest.mark.parametrize("uri", ["nope://user:secret@host/path", "s3://user:secret@host/path?nope=1"])
def test_an_unknown_scheme_or_option_is_named_without_the_password(uri):
    with pytest.raises(ValueError, match=r"cannot open \w+://host/path") as error:
        storage.open_fs(uri)
    assert "secret" not in str(error.value)
    assert storage.shown("/data/a@b/c") == "/data/a@b/c"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://a:b@bucket/x", "s3://bucket/x"),
        ("s3://bucket/x?access_key=A&secret_key=B&region=r", "s3://bucket/x?access_key=...&secret_key=...&region=r"),
        ("s3://bucket?session_token=T;scheme=http", "s3://bucket?session_token=...;scheme=http"),
        ("https://host/x?X-Amz-Signature=abc&v=1", "https://host/x?X-Amz-Signature=...&v=1"),
        ("s3://bucket/x?region=eu&scheme=http", "s3://bucket/x?region=eu&scheme=http"),
        ("/a/folder?secret_key=x", "/a/folder?secret_key=x"),
    ],
)
def test_no_secret_of_a_uri_is_shown(uri, expected):
    assert storage.shown(uri) == expected
