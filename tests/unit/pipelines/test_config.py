"""The data config: what it accepts and what its errors say."""

import pytest
from pydantic import ValidationError

from pipelines.config import DataConfig
from pipelines.source_config import (
    CaptionsSource,
    CocoCaptionsSource,
    EasyVQASource,
    LlavaSource,
    ParquetSource,
    QuestionsSource,
    Vqav2Source,
    WebDatasetSource,
)

VQA = {"type": "vqav2", "questions": "q", "annotations": "a", "images": "i"}
EASY = {"type": "easy_vqa", "split": "train"}


def make(**changes) -> DataConfig:
    return DataConfig(**{"train": [EASY], "tokenizer": {"train_vocab_size": 512}, "max_tokens": 64, **changes})


def test_defaults():
    config = make()
    assert (config.partition_records, config.shard_rows, config.max_quarantined, config.too_long) == (
        1000,
        256,
        0.01,
        "cut",
    )
    assert config.train[0].label == "easy_vqa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": {}}, "exactly one of name"),
        ({"tokenizer": {"name": "x", "train_vocab_size": 512}}, "exactly one of name"),
        ({"train": []}, "train"),
        ({"train": [{"type": "unheard_of"}]}, "easy_vqa"),
        ({"train": [EASY, EASY]}, "two sources called 'easy_vqa'"),
        ({"max_token": 3}, "max_token"),
        ({"too_long": "drop"}, "too_long"),
        ({"name": "no spaces"}, "name"),
        ({"train": [EASY | {"weight": 0}]}, "greater than 0"),
        ({"train": [EASY | {"limit": 0}]}, "greater than or equal to 1"),
        ({"train": [{"type": "parquet", "files": "x"}]}, r"give conversation, or question and answer.*\(now none\)"),
        ({"train": [{"type": "parquet", "files": "x", "question": "q"}]}, r"\(now question\)"),
        ({"train": [{"type": "webdataset", "shards": "x", "caption": "c", "conversation": "d"}]}, "give conversation"),
        ({"train": [VQA | {"image_name": "{image:012d}.jpg"}]}, "expected a name with {image_id} in it"),
        ({"exclude_images_of": [{"type": "unheard_of"}]}, "easy_vqa"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        make(**changes)


def test_fields_are_documented():
    sources = (EasyVQASource, LlavaSource, QuestionsSource, CaptionsSource, WebDatasetSource, ParquetSource)
    sources += (CocoCaptionsSource, Vqav2Source)
    for model in (DataConfig, type(make().tokenizer), *sources):
        assert all(field.description for field in model.model_fields.values()), model


def test_evaluation_sets():
    other = {"type": "easy_vqa", "split": "test", "name": "other"}
    config = make(validation=[EASY], test=[EASY], exclude_images_of=[other])
    assert list(config.evaluation_sets()) == ["test/easy_vqa", "exclude_images_of.0/other"]
    alone = config.model_copy(update={"exclude_evaluation_images": False})
    assert list(alone.evaluation_sets()) == ["exclude_images_of.0/other"]


def test_local_paths_become_absolute_for_workers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    source = WebDatasetSource(type="webdataset", shards=["a/{0..3}.tar", "s3://b/c.tar?region=x"], caption="txt")
    assert source.absolute().shards == [str(tmp_path / "a/{0..3}.tar"), "s3://b/c.tar?region=x"]
    assert EasyVQASource(**EASY).absolute() == EasyVQASource(**EASY)


def test_the_choice_of_records_is_not_among_what_decides_how_one_reads():
    fields = EasyVQASource(**EASY, limit=3, weight=0.5, seed=4, name="n").reader_fields()
    assert not {"limit", "weight", "seed", "repeated_ids"} & {*fields}
    assert fields["name"] == "n"
