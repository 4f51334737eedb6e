"""The sources: what they list, in what order, and that a bad entry does not stop the others."""

import gzip
import io
import json
from importlib import resources

import pytest

from mlmamba.conversation import Turn
from pipelines.config import EasyVQASource, LlavaSource
from pipelines.records import list_records
from pipelines.sources import open_source
from pipelines.sources.easy_vqa import question_type
from pipelines.sources.json_stream import BrokenLine, read_entries


def easy(split: str, **more):
    return open_source(EasyVQASource(type="easy_vqa", split=split, **more))


class TestEasyVQA:
    def test_splits_are_disjoint_complete_and_always_the_same(self):
        train, validation, test = ([r.id for r in easy(split).records()] for split in ("train", "validation", "test"))
        assert (len(train), len(validation), len(test)) == (3700, 300, 1000)
        assert not {*train} & {*validation}
        assert validation == [r.id for r in easy("validation").records()]
        # The held-out pictures must be the same in every version: a run is compared with the runs before it.
        assert validation[:3] == ["easy-vqa-train-4", "easy-vqa-train-8", "easy-vqa-train-21"]
        larger = {r.id for r in easy("validation", validation_images=400).records()}
        assert larger > {*validation}

    def test_a_record(self):
        record = next(easy("test").records())
        questions = json.loads((resources.files("easy_vqa") / "data/test/questions.json").read_text())
        own = [(q, a) for q, a, image in questions if image == 0]
        assert record.turns[0] == Turn("user", own[0][0], images=1)
        assert [(u.text, a.text) for u, a in zip(record.turns[::2], record.turns[1::2], strict=True)] == own
        assert sum(turn.images for turn in record.turns) == len(record.images) == 1
        assert record.question_types == [question_type(answer) for _, answer in own]
        assert easy("test").read_image(record.images[0]).startswith(b"\x89PNG")

    def test_question_types(self):
        assert [question_type(a) for a in ("yes", "no", "circle", "teal")] == ["yes/no", "yes/no", "shape", "colour"]

    def test_a_missing_package_says_what_to_install(self, monkeypatch):
        def missing(name):
            raise ModuleNotFoundError(name)

        monkeypatch.setattr(resources, "files", missing)
        with pytest.raises(ModuleNotFoundError, match=r"pip install mlmamba\[quickstart\]"):
            easy("train")


def entry(name="a", image="x.png", human="<image>\nWhat?", gpt="A dog.", **more):
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns, **more}


@pytest.fixture
def llava(tmp_path):
    """A function from entries (or the file's text) and options to the list of records."""

    def read(content, name="a.json", **options):
        data = (content if isinstance(content, str) else json.dumps(content)).encode("utf-8", "surrogateescape")
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        config = LlavaSource(type="llava", annotations=str(tmp_path / name), images=str(tmp_path), **options)
        return list(open_source(config).records())

    return read


class TestLlava:
    def test_placeholders_say_which_turn_shows_a_picture(self, llava):
        turns = [
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hi"},
            {"from": "human", "value": "<image><image>\nWhich is older?"},
            {"from": "gpt", "value": "The second."},
        ]
        records = llava([entry("both", ["x.png", "y.png"], conversations=turns), entry("text", None, "Why?")])
        assert [turn.images for turn in records[0].turns] == [0, 0, 2, 0]
        assert records[0].images == ["x.png", "y.png"]
        assert records[1].images == []
        assert not any(record.problem for record in records)

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
    def test_lists_and_lines_give_the_same(self, llava, name):
        entries = [entry(str(i), human=f'<image>\n[{i}] é, "quoted" {{') for i in range(5)]
        text = json.dumps(entries, indent=1) if name == "a.json" else "\n".join(map(json.dumps, entries)) + "\n\n"
        records = llava(text, name)
        assert [record.id for record in records] == ["0", "1", "2", "3", "4"]
        assert records[3].turns[0].text == '<image>\n[3] é, "quoted" {'
        assert len(llava(text, name, limit=2)) == 2

    @pytest.mark.parametrize(
        ("bad", "reason", "detail"),
        [
            (7, "malformed", "the entry is a int"),
            ({"id": "x"}, "malformed", "conversations is a NoneType"),
            (entry(name=None), "malformed", "id is None"),
            (entry(conversations=["hi"]), "malformed", "conversations[0] is a str"),
            (entry(conversations=[{"value": "hi"}]), "malformed", "from is None"),
            (entry(conversations=[{"from": "system", "value": "hi"}]), "malformed", "from is 'system'"),
            (entry(gpt=None), "malformed", "conversations[1].value"),
            (entry(gpt="\ud83d"), "malformed", "valid Unicode"),
            (entry(image=3), "malformed", "image is 3"),
            (entry(image="../../secret.png"), "malformed", "leaves the images folder"),
            (entry(image="/secret.png"), "malformed", "leaves the images folder"),
            (entry(human="What?"), "placeholder_mismatch", "0 <image> but the entry has 1"),
            (entry(human="<image><image>What?"), "placeholder_mismatch", "2 <image> but the entry has 1"),
            (entry(image=None), "placeholder_mismatch", "1 <image> but the entry has 0"),
        ],
    )
    def test_a_bad_entry_has_a_reason_and_the_others_go_on(self, llava, bad, reason, detail):
        first, middle, last = llava([entry("one"), bad, entry("two")])
        assert first.problem is last.problem is None
        assert middle.problem.reason == reason
        assert detail in middle.problem.detail
        assert middle.id

    def test_a_broken_line_and_bad_bytes_cost_one_record_each(self, llava):
        lines = [json.dumps(entry("one")), '{"id": ', json.dumps(entry("two")).replace("A dog", "\udcff"), "[]"]
        one, broken, bad_bytes, array = llava("\n".join(lines), "a.jsonl")
        assert one.problem is None
        assert "not a JSON line" in broken.problem.detail
        assert "valid Unicode" in bad_bytes.problem.detail
        assert "the entry is a list" in array.problem.detail

    def test_a_list_that_breaks_off_is_an_error(self, llava):
        text = json.dumps([entry("one"), entry("two")])
        for cut in (len(text) - 1, len(text) - 20, 1):
            with pytest.raises(ValueError, match=r"a\.json: the list ends inside or after entry"):
                llava(text[:cut])
        with pytest.raises(ValueError, match="expected a comma after entry 0"):
            llava("[1 2]")

    def test_repeated_ids(self, llava, tmp_path):
        entries = [entry("a"), entry("b"), entry("a"), entry("a")]
        assert [record.id for record in llava(entries)] == ["a", "b", "a", "a"]
        assert [record.id for record in llava(entries, repeated_ids="number")] == ["a", "b", "a#2", "a#3"]
        config = LlavaSource(type="llava", annotations=str(tmp_path / "a.json"), images=str(tmp_path))
        reasons = [record.problem and record.problem.reason for record in list_records([config])]
        assert reasons == [None, None, "duplicate_id", "duplicate_id"]

    def test_a_missing_file_is_named(self, tmp_path):
        config = LlavaSource(type="llava", annotations=str(tmp_path / "none.json"), images=str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"source 'llava' has no annotations file .*none\.json"):
            list(open_source(config).records())

    def test_the_fingerprint_follows_the_file(self, llava, tmp_path):
        source = open_source(LlavaSource(type="llava", annotations=str(tmp_path / "a.json"), images=str(tmp_path)))
        llava([entry("a")])
        before = source.fingerprint()
        assert source.fingerprint() == before
        llava([entry("b")])
        assert source.fingerprint() != before


def test_entries_that_cross_chunks(monkeypatch):
    monkeypatch.setattr("pipelines.sources.json_stream._CHUNK", 3)
    values = [{"a": [1, 2, {"b": "]}"}]}, 12345, "text, text", [], None]
    assert list(read_entries(io.StringIO(json.dumps(values)), "x")) == values
    assert list(read_entries(io.StringIO("  [ ]"), "x")) == []
    assert list(read_entries(io.StringIO(""), "x")) == []
    lines = list(read_entries(io.StringIO('{"a": 1}\noops\n2\n'), "x"))
    assert lines[0] == {"a": 1}
    assert isinstance(lines[1], BrokenLine)
    assert lines[2] == 2
