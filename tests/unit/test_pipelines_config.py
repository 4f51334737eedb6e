"""The data config: what it accepts and what its errors say."""

import pytest
from pydantic import ValidationError

from pipelines.config import DataConfig

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
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        make(**changes)


def test_fields_are_documented():
    for model in (DataConfig, type(make().train[0]), type(make().tokenizer)):
        assert all(field.description for field in model.model_fields.values()), model
