"""JSON entry by entry: what cannot be read costs itself, what is lost without a word is an error, all in bounds."""

import io
import json
import random

import pytest

from pipelines.sources import json_buffer
from pipelines.sources.json_buffer import BrokenLine
from pipelines.sources.json_stream import parse_json, read_entries, read_member

DEEP = 200_000


def read(text: str) -> list:
    return list(read_entries(io.StringIO(text), "a.json"))


@pytest.fixture(params=[3, 7, 1 << 20])
def chunk(request, monkeypatch):
    """Characters that are read at a time."""
    monkeypatch.setattr(json_buffer, "_CHUNK", request.param)
    return request.param


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}]\n[{"a": 2}]', r"the list ends and '\[' follows at line 2 column 1: a file holds one list"),
        ("[1, 2] x", "the list ends and 'x' follows at line 1 column 8"),
        ('[\n{"a": "say "hi""}\n, 2]', "not JSON in entry 0: Expecting ',' delimiter at line 2 column 13"),
        ('[\n1,\n{"a" 1}, {"b": 20000000000}]', "not JSON in entry 1: Expecting ':' delimiter at line 3 column 6"),
        ('[{"a": 1}', "the list ends inside or after entry 1; is the file cut off"),
        ('[{"a": "b', "the list ends inside or after entry 0; is the file cut off"),
        ("[1 2]", "expected a comma after entry 0 at line 1 column 4, found '2'"),
        (
            '{\n "images": [{"id": 1}],\n "annotations": []\n}',
            "one JSON object with keys images, annotations.*coco_captions",
        ),
        ('{"questions": [\n1]}', "one JSON object with keys questions.*vqav2"),
        ('{\n"a": 1,\n"b": {"c": [1, "]"]}}', "one JSON object with keys a, b, expected a list"),
        ("[\0\0\0", "is in UTF-16 or UTF-32, expected UTF-8"),
        ("\udcff\udcfe[\0", "is in UTF-16"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text, message, chunk):
    with pytest.raises(ValueError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("bad", "detail"),
    [
        ("[" * DEEP + "]" * DEEP, "is nested too deeply"),
        ('{"a":' * DEEP + "1" + "}" * DEEP, "is nested too deeply"),
        ("9" * 5000, "an integer of more than 4,300 digits"),
        ('{"a": [1, %s], "b": "]}"}' % ("7" * 5000), "an integer of more than 4,300 digits"),
        ('{"a": "%s"}' % ("x" * 3000 + '\\"]' * 500), "has more than 2,000 characters"),
    ],
    ids=["deep lists", "deep objects", "digits", "digits inside", "long"],
)
@pytest.mark.parametrize("size", [500, 1 << 20])
def test_what_python_does_not_read_costs_itself(bad, detail, size, monkeypatch):
    monkeypatch.setattr(json_buffer, "_CHUNK", size)
    if "2,000" in detail:
        monkeypatch.setattr(json_buffer, "LONGEST_ENTRY", 2000)
    for text, place in ((f'[{{"n": 1}}, {bad} , {{"n": 2}}]', "entry 1"), (f'{{"n": 1}}\n{bad}\n{{"n": 2}}', "line 2")):
        first, broken, last = read(text)
        assert (first, last) == ({"n": 1}, {"n": 2})
        assert isinstance(broken, BrokenLine)
        assert broken.detail.startswith(place)
        assert detail in broken.detail


def test_a_broken_line_has_its_number(chunk):
    assert [e.detail for e in read('1\n\n{"a": \n3\nx') if isinstance(e, BrokenLine)] == [
        "line 3 is not JSON: Expecting value at column 7",
        "line 5 is not JSON: Expecting value at column 1",
    ]


def test_a_first_line_that_is_broken_is_a_line_and_one_entry_may_be_the_whole_file(chunk):
    broken, good = read('{"id": \n{"id": 2}\n')
    assert isinstance(broken, BrokenLine)
    assert good == {"id": 2}
    assert read('{"id": 1}') == [{"id": 1}]
    assert read('\ufeff {"id": 1}\n') == [{"id": 1}]


def test_random_values_survive_any_chunk(chunk):
    rng = random.Random(0)

    def value(depth: int):
        kinds = ["text", "number", "list", "object"] if depth else ["text", "number"]
        kind = rng.choice(kinds)
        if kind == "text":
            return "".join(rng.choices('ab"\\[]{},: \n', k=rng.randrange(6)))
        if kind == "number":
            return rng.choice([0, -1, 2.5, 1e30, True, None])
        if kind == "list":
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        return {str(i): value(depth - 1) for i in range(rng.randrange(4))}

    entries = [value(4) for _ in range(100)]
    assert read(json.dumps(entries, indent=rng.choice([None, 1]))) == entries
    lines = [entry for entry in entries if entry is not None]
    assert read("1\n" + "\n".join(map(json.dumps, lines))) == [1, *lines]


def test_reading_grows_with_the_entry_so_that_a_long_one_is_not_tried_at_every_chunk(monkeypatch):
    monkeypatch.setattr(json_buffer, "_CHUNK", 10)
    tried = []
    decode = json_buffer.DECODER.raw_decode
    monkeypatch.setattr(
        json_buffer, "DECODER", type("Counting", (), {"raw_decode": lambda _, *a: tried.append(a) or decode(*a)})()
    )
    assert read(json.dumps(["x" * 100_000])) == ["x" * 100_000]
    assert len(tried) < 20


def test_a_list_within_an_object(chunk):
    text = '{"info": {"x": "]["}, "licenses": [[1]], "images": [{"id": 1}, {"id": 2}], "annotations": [3]}'
    assert list(read_member(io.StringIO(text), "a.json", "images")) == [{"id": 1}, {"id": 2}]
    assert list(read_member(io.StringIO(text), "a.json", "annotations")) == [3]
    with pytest.raises(ValueError, match="has no list 'captions', its keys are info, licenses, images, annotations"):
        list(read_member(io.StringIO(text), "a.json", "captions"))
    with pytest.raises(ValueError, match="'info' is not a list"):
        list(read_member(io.StringIO(text), "a.json", "info"))


def test_whole_texts():
    assert parse_json('{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * DEEP)
    with pytest.raises(ValueError, match="4,300 digits"):
        parse_json("1" * 5000)
