"""The sources: what they list, in what order, and that a bad entry does not stop the others."""

import gzip
import io
import json
from importlib import resources

import pytest

from mlmamba.conversation import Turn
from pipelines.source_config import CaptionsSource, EasyVQASource, LlavaSource, QuestionsSource
from pipelines.sources import Record, open_source
from pipelines.sources.easy_vqa import question_type
from pipelines.sources.json_buffer import BrokenLine
from pipelines.sources.json_stream import read_entries
from pipelines.sources.open import share
from tests.helpers.corpora import conversation, write_files
from tests.helpers.images import encoded


def easy(split: str, **more):
    return open_source(EasyVQASource(type="easy_vqa", split=split, **more))


class TestEasyVQA:
    def test_splits_are_disjoint_complete_and_always_the_same(self):
        train, validation, test = ([r.id for r in easy(split).records()] for split in ("train", "validation", "test"))
        assert (len(train), len(validation), len(test)) == (3700, 300, 1000)
        assert not {*train} & {*validation}
        assert validation == [r.id for r in easy("validation").records()]
        # The held-out images must be the same in every version: a run is compared with the runs before it.
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
    def test_placeholders_say_which_turn_shows_an_image(self, llava):
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
            ({"id": "x"}, "malformed", "conversations is missing"),
            (entry(name=[1]), "malformed", "id is [1]"),
            (entry(conversations=["hi"]), "malformed", "conversations[0] is a str"),
            (entry(conversations=[{"value": "hi"}]), "malformed", "from is None"),
            (entry(conversations=[{"from": "system", "value": "hi"}]), "malformed", "set system: drop"),
            (entry(gpt=None), "malformed", "conversations[1].value"),
            (entry(gpt="\ud83d"), "malformed", "valid Unicode"),
            (entry(image=3), "malformed", "image is 3"),
            (entry(image="../../secret.png"), "malformed", "leaves the images folder"),
            (entry(image="/secret.png"), "malformed", "leaves the images folder"),
            (entry(image="a\0b"), "malformed", "expected a path"),
            (entry(name=True), "malformed", "id is True"),
            (entry(conversations=[{"role": "tool", "content": "hi"}]), "malformed", "role is 'tool'"),
            (entry(conversations=[{"role": "user", "content": [{"type": "video"}]}]), "malformed", "[0] is video"),
            (entry(human="<image><image>"), "empty_turn", "turn 0 (user) is empty"),
            (entry(human="What?"), "placeholder_mismatch", "0 <image> but the entry has 1"),
            (entry(human="<image><image>What?"), "placeholder_mismatch", "2 <image> but the entry has 1"),
            (entry(image=None), "placeholder_mismatch", "1 <image> but the entry has 0"),
            (entry(gpt="Look: <image>"), "placeholder_mismatch", "turn 1 is the assistant's but has <image>"),
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
        assert broken.problem.detail == "line 2 is not JSON: Expecting value at column 8"
        assert "valid Unicode" in bad_bytes.problem.detail
        assert "the entry is a list" in array.problem.detail

    def test_a_list_that_breaks_off_is_an_error(self, llava):
        text = json.dumps([entry("one"), entry("two")])
        for cut in (len(text) - 1, len(text) - 20, 1):
            with pytest.raises(ValueError, match=r"a\.json: the list ends inside or after entry"):
                llava(text[:cut])
        with pytest.raises(ValueError, match="expected a comma after entry 0"):
            llava("[1 2]")

    def test_repeated_ids(self, llava):
        entries = [entry("a"), entry("b"), entry("a"), entry("a")]
        assert [record.id for record in llava(entries)] == ["a", "b", "a", "a"]
        assert [record.id for record in llava(entries, repeated_ids="number")] == ["a", "b", "a#2", "a#3"]

    def test_records_without_placeholders(self, llava):
        turns = conversation("What is on the left?", "A cat.", "And on the right?", "A dog.")
        entries = [entry("a", ["x.png", "y.png"], conversations=turns), entry("b", None, "Why?")]
        assert llava(entries)[0].problem.reason == "placeholder_mismatch"
        first, text = llava(entries, no_placeholders="first_turn")
        assert [turn.images for turn in first.turns] == [2, 0, 0, 0]
        assert [turn.images for turn in text.turns] == [0, 0]

    def test_other_forms_of_messages(self, llava):
        parts = [{"type": "text", "text": "Which? "}, {"type": "image"}]
        chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "This."}]
        pairs = [{"user": "Which? <image>", "assistant": "This."}, {"user": "Sure?", "assistant": "Yes."}]
        one, two = llava([entry("a", conversations=chat), entry("b", conversations=pairs)])
        assert one.turns == [Turn("user", "Which? <image>", 1), Turn("assistant", "This.")]
        assert two.turns == [*one.turns, Turn("user", "Sure?"), Turn("assistant", "Yes.")]

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
    monkeypatch.setattr("pipelines.sources.json_buffer._CHUNK", 3)
    values = [{"a": [1, 2, {"b": "]}"}]}, 12345, "text, text", [], None]
    assert list(read_entries(io.StringIO(json.dumps(values)), "x")) == values
    assert list(read_entries(io.StringIO("  [ ]"), "x")) == []
    assert list(read_entries(io.StringIO(""), "x")) == []
    lines = list(read_entries(io.StringIO('{"a": 1}\noops\n2\n'), "x"))
    assert lines[0] == {"a": 1}
    assert isinstance(lines[1], BrokenLine)
    assert lines[2] == 2


class TestSelection:
    """What `limit` and `weight` list, of any source."""

    def test_a_limit_is_for_every_source(self):
        assert [r.id for r in easy("test", limit=2).records()] == ["easy-vqa-test-0", "easy-vqa-test-1"]

    def test_whole_weights_repeat_with_new_ids(self, llava):
        entries = [entry("a"), entry("b"), entry("a")]
        records = llava(entries, weight=2, repeated_ids="number", limit=3)
        assert [record.id for record in records] == ["a", "b", "a#2", "a@2", "b@2", "a#2@2"]
        assert [record.repeat for record in records] == [1, 1, 1, 2, 2, 2]

    def test_a_fraction_keeps_its_share_in_order_and_always_the_same(self, llava):
        entries = [entry(f"{i:04}") for i in range(3000)]
        half = [record.id for record in llava(entries, weight=0.5)]
        assert len(half) == 1500
        assert half == sorted(half)
        assert 400 < sum(name < "1000" for name in half) < 600
        assert half == [record.id for record in llava(entries, weight=0.5)]
        assert half != [record.id for record in llava(entries, weight=0.5, seed=1)]
        more = [record.id for record in llava(entries, weight=2.1, limit=100)]
        assert len(more) == 210
        assert sum(name.endswith("@3") for name in more) == 10

    @pytest.mark.parametrize(("count", "fraction"), [(1, 0.5), (100, 0.29), (5000, 1 / 3), (2049, 0.999)])
    def test_shares_are_exact(self, count, fraction):
        records = [Record(str(i), "s") for i in range(count)]
        assert len(list(share(records, fraction, "key"))) == int(count * fraction + 1e-9)


@pytest.fixture
def read(tmp_path):
    """A function from a config class, files and options to the reader; paths are within the folder of the files."""

    def open_files(kind, files, **options):
        write_files(tmp_path, files)
        paths = {name: str(tmp_path / options[name]) for name in kind.PATHS if name in options}
        return open_source(kind(**(options | paths)))

    return open_files


class TestCaptions:
    TABLE = 'image,caption,who\na.png,"One, two",x\nsub/b.png,Three,y\n'

    def captions(self, read, table, name="t.csv", **options):
        data = gzip.compress(table.encode()) if name.endswith(".gz") else table.encode("utf-8", "surrogateescape")
        files = {name: data, "pics/a.png": encoded(1), "pics/sub/b.png": encoded(2)}
        return read(CaptionsSource, files, type="captions", table=name, images="pics", **options)

    @pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.tsv"])
    def test_a_table(self, read, name):
        table = "image\tcaption\twho\na.png\tOne, two\tx\nsub/b.png\tThree\ty\n" if "tsv" in name else self.TABLE
        source = self.captions(read, table, name)
        one, two = source.records()
        assert one.turns == [Turn("user", "Describe the image.", 1), Turn("assistant", "One, two")]
        assert (one.id, two.id) == ("captions[2]", "captions[3]")
        assert source.read_image(two.images[0]) == encoded(2)

    def test_names_of_columns_and_prompts(self, read):
        table = self.TABLE.partition("\n")[2] * 20
        prompts = ["What is it?", "Describe it."]
        columns = {"columns": ["file", "text", "key"], "image": "file", "caption": "text", "id": "key"}
        records = list(self.captions(read, table, **columns, prompts=prompts, repeated_ids="number").records())
        assert [record.id for record in records[:4]] == ["x", "y", "x#2", "y#2"]
        again = list(self.captions(read, table, **columns, prompts=prompts, repeated_ids="number").records())
        assert again == records
        by_line = self.captions(read, table, columns=["image", "caption", "who"], prompts=prompts).records()
        assert {record.turns[0].text for record in by_line} == {*prompts}

    def test_a_bad_line_costs_itself(self, read):
        table = (
            "image,caption\n"
            "a.png,good\n"
            'a.png,"never ends\n'
            "a.png,good\n"
            "a.png\n"
            "a.png,too,many\n"
            'a.png,"of two\nlines"\n'
            'a.png,"x"y\n'
            "../a.png,leaves\n"
            "a.png,\udcff\n"
            "\n"
            ",no image\n"
            "a.png,good"
        )
        records = list(self.captions(read, table).records())
        found = [record.turns[1].text if record.problem is None else record.problem.detail for record in records]
        assert found[0] == found[2] == found[10] == "good"
        assert found[1].startswith("line 3: ")
        assert found[3:5] == ["line 5 has 1 columns, the table has 2", "line 6 has 3 columns, the table has 2"]
        assert found[5] == "of two\nlines"
        assert found[6].startswith("line 9: ")
        assert "leaves the images folder" in found[7]
        assert "valid Unicode" in found[8]
        assert "expected a path" in found[9]

    def test_in_a_tsv_quotes_are_text(self, read):
        (record,) = self.captions(read, 'image\tcaption\na.png\t"quoted" 5" wide\n', "t.tsv").records()
        assert record.turns[1].text == '"quoted" 5" wide'

    def test_a_column_or_table_that_is_not_there_is_named(self, read):
        with pytest.raises(ValueError, match="no column 'text', its columns are"):
            list(self.captions(read, self.TABLE, caption="text").records())
        source = read(CaptionsSource, {}, type="captions", table="none.csv", images=".")
        with pytest.raises(FileNotFoundError, match=r"source 'captions' has no table file .*none\.csv"):
            list(source.records())


class TestQuestions:
    def test_entries(self, read):
        entries = [
            {"image_id": "23", "question": "Is it red?", "answer": "No.", "task": "negative"},
            {"image_id": 23, "question": "Is it blue?", "answer": "Yes.", "task": "positive"},
            {"image_id": None, "question": "Why?", "answer": "So.", "key": "text", "task": "positive"},
        ]
        files = {"q.json": entries[:2], "image/23.jpg": encoded(23)}
        options = {"type": "questions", "annotations": "q.json", "images": "image", "image_suffix": ".jpg"}
        source = read(QuestionsSource, files, **options, repeated_ids="number", question_type="task")
        one, two = source.records()
        assert one.turns == [Turn("user", "Is it red?", 1), Turn("assistant", "No.")]
        assert (one.id, two.id, one.question_types) == ("23", "23#2", ["negative"])
        assert source.read_image(one.images[0]) == encoded(23)
        (text,) = read(QuestionsSource, {"q.json": entries[2:]}, **options, id="key", text_only=True).records()
        assert (text.id, text.images, text.problem) == ("text", [], None)

    def test_a_field_that_no_entry_has_stops_with_those_that_they_have(self, read):
        entries = [{"id": i, "image": "1.png", "question": "What?", "answer": "This."} for i in range(3)]
        options = {"type": "questions", "annotations": "q.json", "images": ".", "id": "id"}
        with pytest.raises(ValueError, match="no entry has the field image_id; the entries have id, image, question"):
            list(read(QuestionsSource, {"q.json": entries}, **options).records())
        source = read(QuestionsSource, {"q.json": entries}, **options, image="image", question_type="kind")
        with pytest.raises(ValueError, match="no entry has the field kind"):
            list(source.records())
        records = read(QuestionsSource, {"q.json": entries}, **options, text_only=True).records()
        assert [record.images for record in records] == [[], [], []]

    def test_a_number_as_answer_is_text(self, read):
        entries = [{"image_id": str(i), "question": "How many?", "answer": answer} for i, answer in enumerate([3, 2.5])]
        options = {"type": "questions", "annotations": "q.json", "images": "."}
        records = read(QuestionsSource, {"q.json": entries}, **options).records()
        assert [record.turns[1].text for record in records] == ["3", "2.5"]

    @pytest.mark.parametrize(
        ("changes", "reason", "detail"),
        [
            ({"image_id": None}, "image_missing", "image_id is null; text_only: true takes"),
            ({"image_id": [1]}, "malformed", "id is [1]"),
            ({"image_id": "../x"}, "malformed", "leaves the images folder"),
            ({"question": None}, "malformed", "question is not a string"),
            ({"answer": True}, "malformed", "answer is not a string"),
            ({"question": "<image> What?"}, "placeholder_mismatch", "the question has <image>"),
        ],
    )
    def test_a_bad_entry_has_a_reason(self, read, changes, reason, detail):
        good = {"image_id": "1", "question": "What?", "answer": "This."}
        options = {"type": "questions", "annotations": "q.json", "images": "."}
        bad, other = read(QuestionsSource, {"q.json": [good | changes, good]}, **options).records()
        assert (bad.problem.reason, other.problem) == (reason, None)
        assert detail in bad.problem.detail
