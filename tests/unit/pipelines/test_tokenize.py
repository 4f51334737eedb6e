"""Pass 1 without Ray: what one record and one partition become."""

import io
import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import ExifTags, Image

from mlmamba.conversation import IGNORE_INDEX, Turn, encode
from mlmamba.image_layout import ImageLayout
from mlmamba.images import ImageLimits
from pipelines import storage, tokenize
from pipelines.config import TokenizerConfig
from pipelines.fragments import SourceCut, cut_unit, partitions
from pipelines.records import Partition, outcomes_file, tokens_file
from pipelines.source_config import LlavaSource
from pipelines.sources import Problem, Record
from pipelines.tokenize import (
    TokenizeSettings,
    encode_record,
    tokenize_partition,
    worker_source,
)
from pipelines.tokenizer import load_or_train, save


@pytest.fixture(scope="module")
def tokenizer():
    return load_or_train(TokenizerConfig(train_vocab_size=300), ["what is it? a dog or a cat"] * 5)


def settings(tokenizer, max_tokens=64, too_long="cut", folder="") -> TokenizeSettings:
    return TokenizeSettings(folder, "digest", tokenizer.eos_token, max_tokens, 4, too_long)


class Images:
    def read_image(self, location):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), location).save(buffer, "PNG")
        return buffer.getvalue()


def conversation(questions: int) -> Record:
    """Shows an image in the first and the last question."""
    turns = []
    for i in range(questions):
        turns += [Turn("user", "what is it?", images=int(i in (0, questions - 1))), Turn("assistant", f"a dog {i}")]
    return Record("r", "s", ["red", "blue"], turns)


class TestLength:
    def test_a_conversation_that_fits_is_kept_whole(self, tokenizer):
        record = conversation(3)
        encoded, images, lost = encode_record(record, Images(), tokenizer, settings(tokenizer, 500))
        assert encoded == encode(tokenizer, record.turns, 4)
        assert (len(images), lost) == (2, 0)

    def test_a_long_one_is_cut_after_the_last_answer_that_fits(self, tokenizer):
        record = conversation(3)
        whole = encode(tokenizer, record.turns, 4)
        for limit in (whole.turn_ends[1], whole.turn_ends[2] - 1):
            encoded, images, lost = encode_record(record, Images(), tokenizer, settings(tokenizer, limit))
            assert len(encoded.input_ids) == len(encoded.labels) == whole.turn_ends[1]
            assert encoded.input_ids == whole.input_ids[: whole.turn_ends[1]]
            assert encoded.labels[-1] == tokenizer.eos_token_id
            assert (encoded.image_positions, len(images), lost) == ([0], 1, 2)

    def test_nothing_fits_or_the_recipe_does_not_cut(self, tokenizer):
        record = conversation(3)
        ends = encode(tokenizer, record.turns, 4).turn_ends
        problem = encode_record(record, Images(), tokenizer, settings(tokenizer, ends[0] - 1))
        assert problem == Problem(
            "too_long", f"the first turn with its answer has {ends[0]} tokens, a row has {ends[0] - 1}"
        )
        problem = encode_record(record, Images(), tokenizer, settings(tokenizer, ends[1], "quarantine"))
        assert problem == Problem("too_long", f"the conversation has {ends[2]} tokens, a row has {ends[1]}")

    def test_a_question_after_the_last_answer_is_dropped_with_its_image(self, tokenizer):
        record = conversation(2)
        record = Record("r", "s", record.images, record.turns[:-1])
        encoded, images, lost = encode_record(record, Images(), tokenizer, settings(tokenizer, 500))
        assert encoded == encode(tokenizer, record.turns[:2], 4)
        assert (len(images), lost) == (1, 1)


@pytest.fixture
def corpus(tmp_path, tokenizer):
    """Five LLaVA entries, of which one has no image file; a function that cuts and describes them as tasks."""
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    names = ["ok.png", "ok.png", "none.png", "ok.png", "ok.png"]
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a dog"}]
    entries = [{"id": str(i), "image": name, "conversations": turns} for i, name in enumerate(names)]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    source = LlavaSource(type="llava", annotations=str(tmp_path / "a.json"), images=str(tmp_path))
    save(tokenizer, str(tmp_path / "tokenizer"))
    work = str(tmp_path / "work")
    own = settings(tokenizer, folder=str(tmp_path / "tokenizer"))

    def tasks(size=3, **changes) -> list[dict]:
        changed = {**vars(own), **changes}
        cut = SourceCut(source, str(tmp_path / "cut"), records=None)
        file = cut_unit({"name": "", "number": 0, "source": source.model_dump_json(), "unit": "", "size": size}
                        | {"file": str(tmp_path / "cut/0.jsonl")})  # fmt: skip
        cut.files = [(str(tmp_path / "cut/0.jsonl"), file["fragments"])]
        return [
            {
                "partition": partition.to_json(),
                "work": work,
                "source": source.model_dump_json(),
                "settings": changed,
            }
            for partition in partitions("train", [cut], TokenizeSettings(**changed).digest())
        ]

    return tasks


def digest_of(task: dict) -> str:
    return task["partition"]["digest"]


class TestPartition:
    def test_a_partition_survives_json(self, corpus):
        records = []
        for task in corpus():
            partition = Partition.from_json(json.loads(json.dumps(task["partition"])))
            assert partition.to_json() == task["partition"]
            records += partition.read(worker_source(task["source"]))
        assert [record.id for record in records] == ["0", "1", "2", "3", "4"]
        assert records[0].turns == [Turn("user", "<image>\nwhat is it?", images=1), Turn("assistant", "a dog")]

    def test_files(self, corpus, tmp_path, tokenizer):
        result = tokenize_partition(corpus()[0])
        assert result == {
            "name": "train-00000",
            "split": "train",
            "source": "llava",
            "records": 3,
            "cut": 0,
            "quarantined": {"image_missing": 1},
            "losses": [],
            "skipped": False,
        }
        with pa.memory_map(str(tmp_path / "work/tokens/train-00000.arrow")) as file:
            rows = pa.ipc.open_file(file).read_all().to_pylist()
        assert [row["record_id"] for row in rows] == ["0", "1"]
        assert rows[0]["images"] == [(tmp_path / "ok.png").read_bytes()]  # the file itself, not decoded pixels
        assert tokenizer.decode(rows[0]["input_ids"]).startswith("<image>" * 4 + "<|user|>\nwhat is it?")
        assert rows[0]["labels"][0] == IGNORE_INDEX
        outcomes = storage.open_arrow(str(tmp_path / "work/outcomes/train-00000.arrow")).read_all().to_pylist()
        assert [row["reason"] for row in outcomes] == [None, None, "image_missing"]
        assert outcomes[0]["length"] == len(rows[0]["input_ids"])

    def test_done_ones_are_skipped_until_something_changes(self, corpus):
        first, second = corpus()
        assert not tokenize_partition(first)["skipped"]
        assert tokenize_partition(first) == {**tokenize_partition(first), "skipped": True}
        assert not tokenize_partition(second)["skipped"]
        assert tokenize_partition(corpus()[1])["skipped"]
        assert not tokenize_partition(corpus(max_tokens=65)[0])["skipped"]
        assert not tokenize_partition(corpus(size=2)[0])["skipped"]
        storage.delete(tokens_file(corpus(size=2)[0]["work"], "train-00000"))
        assert not tokenize_partition(corpus(size=2)[0])["skipped"]

    def test_a_repaired_image_is_noticed(self, corpus, tmp_path):
        task = corpus()[0]
        tokenize_partition(task)
        assert tokenize_partition(task)["skipped"]
        Image.new("RGB", (8, 8)).save(tmp_path / "none.png")
        again = tokenize_partition(task)
        assert (again["skipped"], again["quarantined"]) == (False, {})

    def test_the_limits_of_images_reach_the_task(self, corpus):
        first, _ = corpus(images=asdict(ImageLimits(max_pixels=10)))
        assert tokenize_partition(json.loads(json.dumps(first)))["quarantined"] == {"image_bomb": 2, "image_missing": 1}
        usual = corpus()[0]
        same = corpus(images=asdict(ImageLimits()))[0]
        assert digest_of(usual) == digest_of(same) != digest_of(first)

    def test_whatever_a_record_does_its_neighbours_go_on(self, corpus, monkeypatch):
        encode_good = tokenize.encode_record

        def explode(record, *rest):
            if record.id == "1":
                raise RuntimeError("the unexpected")
            return encode_good(record, *rest)

        monkeypatch.setattr(tokenize, "encode_record", explode)
        task = corpus()[0]
        assert tokenize_partition(task)["quarantined"] == {"image_missing": 1, "malformed": 1}
        outcomes = storage.open_arrow(outcomes_file(task["work"], "train-00000")).read_all().to_pylist()
        assert outcomes[1]["detail"] == "RuntimeError: the unexpected"
        assert storage.open_arrow(tokens_file(task["work"], "train-00000")).num_record_batches == 1

    def test_the_digest_depends_on_the_records_not_on_the_place(self, corpus):
        digests = [*map(digest_of, corpus())]
        assert len({*digests}) == 2
        assert [*map(digest_of, corpus(tokenizer="elsewhere"))] == digests
        assert not {*digests} & {*map(digest_of, corpus(too_long="quarantine"))}


def test_the_arrays_are_small_integers(corpus):
    task = corpus()[0]
    tokenize_partition(task)
    batch = storage.open_arrow(tokens_file(task["work"], "train-00000")).get_batch(0)
    assert batch["input_ids"].flatten().to_numpy().dtype == np.int32


class Sizes:
    """Images whose location is their size."""

    def read_image(self, location):
        width, height = map(int, location.split("x"))
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # lies on its side
        Image.new("RGB", (width, height)).save(buffer, "JPEG", exif=exif)
        return buffer.getvalue()


def test_each_image_has_as_many_tokens_as_its_size_asks_for(tokenizer):
    sizes = {"patch": 16, "merge": 1, "min_tokens": 2, "max_tokens": 12}
    record = replace(conversation(3), images=["32x32", "48x64"])
    native = replace(settings(tokenizer, 500), tokens_per_image=sizes)
    encoded, images, _ = encode_record(record, Sizes(), tokenizer, native)
    assert encoded == encode(tokenizer, record.turns, [4, 12])
    layout = ImageLayout.of(sizes)
    assert [layout.load(data).tokens for data in images] == [4, 12]
    short = replace(native, max_tokens=encoded.turn_ends[1])
    cut, kept, lost = encode_record(record, Sizes(), tokenizer, short)
    assert (len(kept), lost, cut.input_ids) == (1, 2, encoded.input_ids[: encoded.turn_ends[1]])
    assert native.digest() != replace(native, tokens_per_image=sizes | {"max_tokens": 13}).digest()
    broken = encode_record(replace(record, images=["32x32", "5000x10"]), Sizes(), tokenizer, native)
    assert broken.reason == "image_aspect"
