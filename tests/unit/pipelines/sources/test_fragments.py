"""Fragments of every kind of source, one after the other, are the whole source: its records, in their order."""

import gzip
import json
import random

import pyarrow as pa
import pytest

from pipelines.source_config import (
    CaptionsSource,
    CocoCaptionsSource,
    EasyVQASource,
    LlavaSource,
    ParquetSource,
    WebDatasetSource,
)
from pipelines.sources import json_cut, open_source, webdataset
from pipelines.sources.open import Choice, share, share_rows
from tests.helpers.corpora import conversation, write_files, write_parquet, write_tar
from tests.helpers.images import encoded

TEXTS = ["plain", "a \\ back", 'q"uote', "[{,}]", "é犬\u2028", "line\nbreak", '\\\\"', "end\\"]


def entries(count: int) -> list[dict]:
    chance = random.Random(count)
    made = []
    for i in range(count):
        text = chance.choice(TEXTS) * chance.randint(1, 5)
        own = {"id": f"r{i}"} if chance.random() < 0.5 else {}
        made.append(
            own | {"image": "a.png", "more": [1, ["]", {"a": []}]], "conversations": conversation("<image>", text)}
        )
    return made


def llava(path) -> LlavaSource:
    return LlavaSource(type="llava", annotations=str(path), images=str(path.parent), prompts=["What?"])


def read(config, size: int):
    """The records by fragments, each listed by a reader of its own, and the fragments."""
    source = open_source(config)
    fragments = [fragment for unit in source.units() for fragment in source.cut(unit, size)]
    records = []
    for fragment in fragments:
        own = list(open_source(config).read(fragment))
        assert fragment.records in (None, len(own))
        records += own
    assert len({fragment.digest for fragment in fragments}) == len(fragments)
    return records, fragments


def check(config, sizes=(1, 3, 7, 1000)) -> None:
    whole = list(open_source(config).records())
    for size in sizes:
        records, fragments = read(config, size)
        assert records == whole
    assert len(fragments) <= 1


LAYOUTS = {
    "list.json": lambda made: json.dumps(made),
    "spread.json": lambda made: "\ufeff \n" + json.dumps(made, indent=2, ensure_ascii=False) + "\n\n",
    "comma.json": lambda made: "[" + ",".join(map(json.dumps, made)) + (",]" if made else "]"),
    "lines.jsonl": lambda made: "\n".join(map(json.dumps, made)),
    "windows.jsonl": lambda made: "\r\n".join(
        json.dumps(entry, ensure_ascii=False) + ["", " ", "\r\n", "\r\n \t\u00a0", "\r\nbroken {"][i % 5]
        for i, entry in enumerate(made)
    ),
    "mac.jsonl": lambda made: "\r".join(map(json.dumps, made)),
}


@pytest.mark.parametrize("chunk", [64, 1 << 22])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_json(tmp_path, monkeypatch, layout, chunk):
    monkeypatch.setattr(json_cut, "_CHUNK", chunk)
    for count in (0, 1, 2, 40):
        data = LAYOUTS[layout](entries(count)).encode()
        (tmp_path / layout).write_bytes(data)
        check(llava(tmp_path / layout))
        with gzip.open(tmp_path / f"{layout}.gz", "wb") as file:
            file.write(data)
        check(llava(tmp_path / f"{layout}.gz"))


def test_json_is_entered_in_the_middle_and_much_text_makes_smaller_fragments(tmp_path, monkeypatch):
    monkeypatch.setattr(json_cut, "_CHUNK", 1024)
    monkeypatch.setattr(json_cut, "LARGEST", 4096)
    for layout in ("list.json", "lines.jsonl"):
        made = entries(200)
        (tmp_path / layout).write_text(LAYOUTS[layout](made))
        records, fragments = read(llava(tmp_path / layout), 150)
        assert len(records) == 200
        assert len(fragments) > 4
        assert max(fragment.stop - fragment.start for fragment in fragments) < 8192
        (tmp_path / layout).write_text(LAYOUTS[layout]([*made[:170], {"id": "new"}, *made[170:]]))
        _, again = read(llava(tmp_path / layout), 150)
        same = [a.digest == b.digest for a, b in zip(fragments, again, strict=False)]
        assert same == [fragment.first + fragment.records <= 170 for fragment in fragments][: len(same)]


@pytest.mark.parametrize(
    "text",
    [
        "[1,2",
        '[{"id":"1","image":"a","conversations":[]},,{"id":"x"}]',
        "[] []",
        '[{"conversations":[]}] x',
        '{"a":[{"b":1}]}',
        '[{"conversations":[],"a":[}]},{"conversations":1}]',
        '[{"conversations":1},nope,{"conversations":2},{"conversations":3}]',
        '[{"image":"a"},\n {"image":"b"}]',
    ],
)
def test_what_is_no_json_is_told_as_when_it_is_read_whole(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json|source 'llava'") as whole:
        list(open_source(llava(tmp_path / "a.json")).records())
    with pytest.raises(ValueError, match=r"a\.json|source 'llava'") as parts:
        read(llava(tmp_path / "a.json"), 2)
    assert str(parts.value) == str(whole.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_json_gives_the_same_records_or_error_however_it_is_cut(tmp_path, monkeypatch, layout):
    """Sixty files, each with up to three changes at random places, also with a limit before or behind them."""
    chance = random.Random(layout)
    path = tmp_path / layout
    for _ in range(60):
        monkeypatch.setattr(json_cut, "_CHUNK", chance.choice([64, 257, 1 << 22]))
        data = bytearray(LAYOUTS[layout](entries(chance.randint(1, 12))).encode())
        for _ in range(chance.randint(1, 3)):
            at, piece = chance.randrange(3, len(data) + 1), chance.choice(PIECES)
            data[at : at + chance.choice([0, 0, 1, 30])] = piece
        path.write_bytes(data)
        config = llava(path).model_copy(update={"limit": chance.choice([None, None, 1, 5])})
        size = chance.choice([1, 3, 50])
        whole = outcome(lambda config=config: list(open_source(config).records()))
        assert outcome(lambda config=config, size=size: read_limited(config, size)) == whole


PIECES = [b'"', b"\\", b"[", b"]", b"{", b"}", b",", b"\n", b"\r", b"\r\n", b" ", b"\0", b"\xff", b"\xc2\xa0", b"[]"]


def outcome(read) -> list | str:
    try:
        return read()
    except (ValueError, OSError) as error:
        return str(error)


def read_limited(config, size: int) -> list:
    records, source = [], open_source(config)
    for fragment in source.cut("", size):
        if config.limit is None or len(records) < config.limit:
            take = config.limit and config.limit - len(records)
            records += open_source(config).read(fragment, Choice(take=take))
    return records


def test_a_file_that_changes_after_it_was_cut_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, entries(20))))
    source = open_source(llava(path))
    *_, last = source.cut("", 5)
    path.write_text("\n".join(map(json.dumps, entries(15))))
    with pytest.raises((ValueError, OSError), match=r"a\.jsonl .*something writes to it"):
        list(source.read(last))


def test_tars_and_a_table(tmp_path):
    for shard in range(3):
        members = [
            (f"{i}.{kind}", content) for i in range(5) for kind, content in (("png", encoded(i)), ("txt", f"No {i}."))
        ]
        write_tar(tmp_path / f"s-{shard}.tar", members)
    config = WebDatasetSource(type="webdataset", shards=str(tmp_path / "s-*.tar"), caption="txt")
    records, fragments = read(config, 2)
    assert records == list(open_source(config).records())
    assert [fragment.unit for fragment in fragments] == ["s-0.tar", "s-1.tar", "s-2.tar"]
    write_files(tmp_path, {"t.csv": 'image,caption\na.png,"two\nlines"\n' + "b.png,one\n" * 50})
    check(CaptionsSource(type="captions", table=str(tmp_path / "t.csv"), images=str(tmp_path)))
    images, texts = [{"id": 1, "file_name": "a.png"}], [{"id": i, "image_id": 1, "caption": f"c{i}"} for i in range(40)]
    write_files(tmp_path, {"coco.json": {"images": images, "annotations": texts}})
    check(CocoCaptionsSource(type="coco_captions", annotations=str(tmp_path / "coco.json"), images=str(tmp_path)))
    _, fragments = read(EasyVQASource(type="easy_vqa", split="validation"), 1)
    assert len(fragments) == 16  # each is listed from the start


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_large_tar_is_cut_behind_its_samples(tmp_path, monkeypatch, size):
    monkeypatch.setattr(webdataset, "_WHOLE", 1000)
    names = [f"{'long' * 40 * (i % 3)}/{i}.{kind}" for i in range(12) for kind in ("png", "txt")]
    names.insert(9, "README")
    members = [(name, encoded(0) if name.endswith("png") else "A caption.") for name in names]
    data = write_tar(tmp_path / "s.tar", members).read_bytes()
    config = WebDatasetSource(type="webdataset", shards=str(tmp_path / "s.tar"), caption="txt")
    for content, damaged in ((data, False), (data + data, False), (data[: len(data) * 2 // 3], True)):
        (tmp_path / "s.tar").write_bytes(content)
        records, fragments = read(config, size)
        assert records == list(open_source(config).records())
        assert (len(fragments) > 1) == (size < 100)
        assert any(record.problem is not None for record in records) == damaged


@pytest.mark.parametrize("group", [1, 7, 100])
@pytest.mark.parametrize("field", ["caption", "captions"])
def test_parquet(tmp_path, group, field):
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", cell), ("captions", pa.list_(pa.string())), ("caption", pa.string())])
    for part in range(2):
        columns = {
            "image": [{"bytes": encoded(i), "path": "x"} for i in range(100)],
            "captions": [["a", "b"] for i in range(100)],
            "caption": [f"{i} of {part}" for i in range(100)],
        }
        write_parquet(tmp_path / f"{part}.parquet", columns, schema, rows=group)
    config = ParquetSource(type="parquet", files=str(tmp_path / "*.parquet"), caption=field)
    whole = list(open_source(config).records())
    for size in (1, 10, 30, 1000):
        records, fragments = read(config, size)
        assert records == whole
        assert len(fragments) <= 2 * max(100 // size + 1, 100 // group * 16)
    data = bytearray((tmp_path / "1.parquet").read_bytes())
    data[len(data) // 3 : len(data) // 3 + 400] = bytes(400)
    (tmp_path / "1.parquet").write_bytes(data)
    whole = list(open_source(config).records())
    for size in (10, 1000):
        assert read_damaged(config, size) == whole
    (tmp_path / "1.parquet").write_bytes(data[: len(data) // 2])
    assert read_damaged(config, 10) == list(open_source(config).records())


def read_damaged(config, size: int) -> list:
    source = open_source(config)
    return [record for unit in source.units() for part in source.cut(unit, size) for record in source.read(part)]


@pytest.mark.parametrize("total", [0, 5, 1024, 3000])
@pytest.mark.parametrize("fraction", [0.29, 0.5, 0.999])
def test_a_share_is_the_same_by_fragments(total, fraction):
    whole = list(share(range(total), fraction, "source", 7))
    assert len(whole) == int(total * fraction + 1e-9)
    parts = [share_rows(start, min(start + 170, total), total, fraction, "source", 7) for start in range(0, total, 170)]
    assert [row for part in parts for row in part] == whole
