"""Folders on a disk: names, whole or absent. test_storage_s3.py has those of an object store."""

from pathlib import Path

import pytest

from workflows.storage.folder import Folder


@pytest.mark.parametrize("where", ["/lab/x", "/lab/x/", "file:///lab/x", Path("/lab/x")])
def test_a_path_is_the_same_however_it_is_written(where):
    assert Folder(where) == Folder("/lab/x")
    assert Folder(where).uri == Folder(where).shown == "/lab/x"
    assert not Folder(where).remote


def test_a_relative_path_becomes_absolute():
    assert Folder("lab").local == Path("lab").absolute()


@pytest.mark.parametrize("base", ["/lab/a?b", "s3://bucket/lab?region=x"])
def test_children_and_neighbours_have_names(base):
    child = Folder(base) / "runs" / "x"
    assert child == Folder(base) / "runs/x"
    assert (child.name, child.beside(".x.lock").name) == ("x", ".x.lock")
    assert child.beside("y") == Folder(base) / "runs" / "y"


def test_a_store_s_folder_is_shown_without_a_password_and_has_a_copy_here(tmp_path, monkeypatch):
    monkeypatch.setenv("MLMAMBA_CACHE", str(tmp_path))
    folder = Folder("s3://user:hidden@bucket/lab/?region=x") / "a"
    assert folder.remote
    assert str(folder) == folder.shown == "s3://bucket/lab/a?region=x"
    assert folder.local.is_relative_to(tmp_path)
    assert folder.local == Folder("s3://bucket/lab/a?region=x").local


def test_files_are_written_whole_and_read(tmp_path):
    folder = Folder(tmp_path) / "x"
    assert not folder.exists()
    with pytest.raises(FileNotFoundError):
        folder.read("a.json")
    folder.write("inside/a.json", "{}")
    assert folder.read("inside/a.json") == b"{}"
    assert (folder / "inside" / "a.json").exists()


def test_publishing_a_finished_folder_replaces_what_was_there(tmp_path):
    folder, made = Folder(tmp_path) / "out" / "x", tmp_path / "made"
    folder.write("old", "")
    made.mkdir()
    (made / "new").write_text("")
    folder.publish(made)
    assert folder.whole()
    assert [file.name for file in folder.local.iterdir()] == ["new"]
    assert not made.exists()


def test_writing_and_editing_give_the_folder_itself(tmp_path):
    folder = Folder(tmp_path) / "out" / "x"
    with folder.writing() as path:
        assert not path.exists()
        path.mkdir()
    with folder.editing() as path:
        assert path == folder.fetch() == tmp_path / "out" / "x"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["x"]  # no marks or locks beside it


def test_a_deleted_folder_is_gone(tmp_path):
    folder = Folder(tmp_path) / "x"
    folder.write("inside/a", "")
    folder.delete()
    folder.delete()
    assert not folder.exists()
