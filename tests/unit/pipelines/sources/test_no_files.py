"""What stands where a file is expected and is none: a pipe, a device, a folder, a link to nothing. One line each, and
nobody waits for what will never come."""

import json
import os
import threading

import pytest

from pipelines import storage
from pipelines.guess import guess
from pipelines.source_config import CaptionsSource, LlavaSource, ParquetSource, WebDatasetSource
from pipelines.sources import open_source

MAKE = {
    "pipe": os.mkfifo,
    "device": lambda path: os.symlink("/dev/zero", path),
    "folder": os.mkdir,
}
SOURCES = {
    "a.json": lambda path, root: LlavaSource(type="llava", annotations=path, images=root),
    "a.json.gz": lambda path, root: LlavaSource(type="llava", annotations=path, images=root),
    "a.csv": lambda path, root: CaptionsSource(
        type="captions", table=path, images=root, image="a", caption="b", prompts=["?"]
    ),
    "a.tar": lambda path, root: WebDatasetSource(type="webdataset", shards=path, caption="txt"),
    "*.tar": lambda path, root: WebDatasetSource(type="webdataset", shards=path, caption="txt"),
    "a.parquet": lambda path, root: ParquetSource(type="parquet", files=path, caption="b"),
    "*.parquet": lambda path, root: ParquetSource(type="parquet", files=path, caption="b"),
}


def error_of(function) -> Exception | None:
    """What a call raises; fails where it waits."""
    raised = []

    def call():
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits"
    return raised[0] if raised else None


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", SOURCES)
def test_it_is_said_in_one_line_what_it_is(tmp_path, name, kind):
    MAKE[kind](str(tmp_path / name.replace("*", "a")))
    error = error_of(lambda: list(open_source(SOURCES[name](str(tmp_path / name), str(tmp_path))).records()))
    assert isinstance(error, storage.NotReadable)
    text = str(error)
    assert "\n" not in text
    assert f"{tmp_path / name.replace('*', 'a')} is a {kind}" in text


@pytest.mark.parametrize("kind", MAKE)
def test_a_zip_and_what_data_guess_looks_at(tmp_path, kind):
    MAKE[kind](str(tmp_path / "a.zip"))
    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "this"}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "1", "image": "1.jpg", "conversations": turns}]))
    config = LlavaSource(type="llava", annotations=str(tmp_path / "a.json"), images=str(tmp_path / "a.zip"))
    error = error_of(lambda: list(open_source(config).records()))
    assert f"a.zip is a {kind}" in str(error)
    for name in ("b.json", "b.tar", "b.parquet"):
        MAKE[kind](str(tmp_path / name))
        if kind != "folder":  # a folder is looked into
            assert f"{name} is a {kind}" in str(error_of(lambda name=name: guess([str(tmp_path / name)])))


def test_a_link_to_nothing_is_no_file(tmp_path):
    os.symlink("nothing", tmp_path / "a.tar")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*/a\.tar"):
        list(open_source(SOURCES["a.tar"](str(tmp_path / "a.tar"), "")).records())


@pytest.mark.parametrize("read", [storage.read_bytes, storage.checksum, storage.open_arrow])
def test_other_reads_of_whole_files(tmp_path, read):
    os.mkfifo(tmp_path / "a")
    error = error_of(lambda: read(str(tmp_path / "a")))
    assert f"{tmp_path / 'a'} is a pipe and no file: write what comes out of it into a file" in str(error)
