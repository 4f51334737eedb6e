"""Which source entry reads a corpus, found by looking at it, and why none does."""

import json

import pyarrow as pa
import pytest

from pipelines.guess import Unknown, guess
from tests.helpers.corpora import conversation, write_files, write_parquet, write_tar, write_zip
from tests.helpers.images import encoded
from workflows.cli import main

PICS = {f"pics/{i}.png": encoded(i) for i in range(4)}
CHAT = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "This."}]
TALK = conversation("<image>\nWhat?", "This.")


def json_corpus(entries, name="a.json"):
    def write(folder):
        content = "\n".join(map(json.dumps, entries)) if name.endswith("jsonl") else entries
        write_files(folder, {name: content, **PICS})
        return [folder / name]

    return write


def table(folder):
    write_files(folder, {"t.tsv": "file_name\tcaption\n1.png\tA dog.\n", **PICS})
    return [folder / "t.tsv", folder / "pics"]


def shards(folder):
    members = [("a.png", encoded(1)), ("a.json", {"width": 3, "conversations": TALK}), ("a.txt", "A dog.")]
    write_tar(folder / "s-0.tar", members)
    write_tar(folder / "s-1.tar", [(name.replace("a.", "b."), content) for name, content in members])
    return [folder / "s-0.tar", folder / "s-1.tar"]


def captioned_shard(folder):
    return [write_tar(folder / "s.tar", [("a.png", encoded(1)), ("a.txt", "A dog."), ("a.json", {"width": 3})])]


def rows(folder):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("messages", pa.list_(message)), ("images", pa.list_(image)), ("score", pa.int64())])
    stored = [[{"bytes": encoded(1), "path": None}]]
    return [write_parquet(folder / "a.parquet", {"messages": [CHAT], "images": stored, "score": [1]}, schema)]


def coco(folder):
    content = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [{"id": 5, "image_id": 1, "caption": "A dog."}],
    }
    write_files(folder, {"captions.json": json.dumps(content, indent=1), **PICS})
    return [folder / "captions.json", folder / "pics"]


def vqa(folder):
    questions = {"questions": [{"question_id": 1, "image_id": 1, "question": "What?"}]}
    answers = {"annotations": [{"question_id": 1, "multiple_choice_answer": "a dog", "answer_type": "other"}]}
    image = {"pics/COCO_train2014_000000000001.jpg": encoded(kind="JPEG")}
    write_files(folder, {"q.json": questions, "a.json": answers, **image})
    return [folder]


def zipped(folder):
    write_files(folder, {"a.jsonl": json.dumps({"id": "x", "image": "1.png", "conversations": TALK})})
    write_zip(folder / "images.zip", {"1.png": encoded(1)})
    return [folder / "a.jsonl"]


LAYOUTS = {
    "llava": (
        json_corpus([{"id": str(i), "image": f"{i}.png", "conversations": TALK} for i in range(4)]),
        {"type": "llava"},
    ),
    "llava in a zip": (zipped, {"type": "llava"}),
    "messages and images": (json_corpus([{"messages": CHAT, "images": ["1.png"]}], "a.jsonl"), {"type": "llava"}),
    "no placeholders": (
        json_corpus([{"images": ["1.png"], "conversations": conversation("What?", "This.")}]),
        {"no_placeholders": "first_turn"},
    ),
    "system": (
        json_corpus([{"image": "1.png", "conversations": [{"from": "system", "value": "Be short."}, *TALK]}]),
        {"system": "first_turn"},
    ),
    "prompt and completion": (
        json_corpus([{"prompt": "<image>What?", "completion": "This.", "image": "1.png"}]),
        {"type": "llava"},
    ),
    "questions": (
        json_corpus(
            [{"question_id": i, "image": f"{i}.png", "question": "What?", "answer": "This."} for i in range(4)]
        ),
        {"type": "questions", "image": "image", "id": "question_id"},
    ),
    "questions by number": (
        json_corpus([{"image_id": "1", "question": f"What {i}?", "answer": "This."} for i in range(4)]),
        {"type": "questions", "image_suffix": ".png", "repeated_ids": "number"},
    ),
    "table": (table, {"type": "captions", "image": "file_name"}),
    "shards": (shards, {"type": "webdataset", "conversation": "json.conversations"}),
    "captioned shard": (captioned_shard, {"type": "webdataset", "caption": "txt"}),
    "parquet": (rows, {"type": "parquet", "image": "images", "conversation": "messages"}),
    "coco": (coco, {"type": "coco_captions"}),
    "vqav2": (vqa, {"type": "vqav2"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_found_and_reads_every_record(layout, tmp_path):
    write, expected = LAYOUTS[layout]
    found = guess([str(path) for path in write(tmp_path)])
    assert expected.items() <= found.source.items()
    assert found.good == found.listed > 0, found.notes


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (
            {"data-00000-of-00001.arrow": b"", "state.json": {}, "dataset_info.json": {}},
            "datasets.save_to_disk.*to_parquet",
        ),
        ({"a.json": [{"image": "1.png", "caption": "A dog."}]}, "image and caption, which is read as a CSV table"),
        ({"a.json": [{"x": 1, "y": 2}]}, "have x, y: no source reads them"),
        ({"a.json": json.dumps({"x": [1], "y": 2}, indent=1)}, "one JSON object with keys x, y"),
        ({"a.json": {"questions": []}}, "give the file of their annotations as well"),
        ({"t.csv": "a,b\n1,2\n"}, "names no image and caption"),
        ({"1.png": encoded()}, "no annotations among the files"),
    ],
)
def test_what_nothing_reads_is_told_why(files, why, tmp_path):
    write_files(tmp_path, files)
    with pytest.raises(Unknown, match=why):
        guess([str(tmp_path)])


def test_the_command_prints_the_entry_and_the_first_problem(tmp_path, capsys):
    entries = [{"id": str(i), "image": f"{i}.png", "conversations": TALK} for i in range(6)]
    write_files(tmp_path, {"a.json": [*entries[:3], {"id": "bad", "image": "1.png"}, entries[0] | {"id": "x"}], **PICS})
    assert main(["data", "guess", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    assert f"- type: llava\n  annotations: {tmp_path}/a.json\n  images: {tmp_path}/pics\n" in out
    assert "4 of the first 5 records can be used" in out
    assert "first problem: record bad: malformed: conversations is missing" in out
    assert main(["data", "guess", str(tmp_path / "none.json")]) == 1
    assert main(["data", "inspect", str(tmp_path), str(tmp_path)]) == 2
    assert "looks into one data set" in capsys.readouterr().err
