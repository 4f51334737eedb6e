"""A source that is split by image: each record on one side, and each image, however the corpus is named or grows."""

import pytest
from pydantic import ValidationError

from mlmamba.conversation import Turn
from pipelines.config import DataConfig
from pipelines.held_out import on_side
from pipelines.sources import Problem, Record

TURNS = [Turn("user", "what is it?", images=1), Turn("assistant", "a dog")]


class Images:
    """An image's file is its name without what comes after a dot, so that several names are one image."""

    def __init__(self):
        self.reads = 0

    def read_image(self, location: str) -> bytes:
        self.reads += 1
        if location.startswith("gone"):
            raise FileNotFoundError(location)
        return location.partition(".")[0].encode()


def record(name: str, *images: str, text: str = "") -> Record:
    turns = TURNS if images else [Turn("user", text or name), Turn("assistant", "yes")]
    return Record(name, "s", list(images), turns)


def side(records, split: str, share: float = 0.3) -> list[str]:
    return [found.id for found, _ in on_side(records, Images(), share, split)]


def test_every_record_is_on_one_side_and_about_the_share_is_held_out():
    records = [record(str(i), f"{i}.png") for i in range(2000)]
    train, held = side(records, "train"), side(records, "validation")
    assert sorted(train + held, key=int) == [str(i) for i in range(2000)]
    assert 500 < len(held) < 700


def test_records_of_one_image_stay_together_under_any_name_and_order():
    records = [record(f"{i}-{k}", f"{i}.{k}") for k in range(3) for i in range(100)]
    held = side(records, "validation")
    assert len(held) == 3 * len({name.partition("-")[0] for name in held}) > 0
    assert sorted(side(records[::-1], "validation")) == sorted(held)
    assert side(records[:150], "validation") == [name for name in held if name in {r.id for r in records[:150]}]


def test_a_larger_share_holds_out_more_and_nothing_less():
    records = [record(str(i), f"{i}.png") for i in range(500)]
    shares = [set(side(records, "validation", share)) for share in (0.05, 0.2, 0.6)]
    assert shares[0] < shares[1] < shares[2]


def test_records_without_an_image_go_by_their_text():
    records = [record(f"{k}{i}", text=f"question {i}") for k in "ab" for i in range(200)]
    held = side(records, "validation")
    assert {name[1:] for name in held if name[0] == "a"} == {name[1:] for name in held if name[0] == "b"} != set()


def test_what_cannot_be_read_is_left_to_the_training_side():
    broken = Record("broken", "s", problem=Problem("malformed", "no list"))
    records = [broken, *(record(f"g{i}", f"gone{i}") for i in range(50))]
    assert side(records, "validation") == []
    assert len(side(records, "train")) == 51


def test_an_image_is_read_once_and_a_source_that_is_not_split_not_at_all():
    images = Images()
    for _, source in on_side([record("a", "1.png")], images, 1e-9, "train"):
        assert source.read_image("1.png") == source.read_image("1.png") == b"1"
    assert images.reads == 1
    ((_, source),) = on_side([record("a", "1.png")], images, 0, "validation")
    assert source is images
    assert images.reads == 1


@pytest.mark.parametrize("field", ["validation", "test", "exclude_images_of"])
def test_only_sources_of_training_are_split(field):
    plain = {"type": "llava", "annotations": "a.json"}
    fields = {"train": [plain], "tokenizer": {"train_vocab_size": 300}, "max_tokens": 64}
    with pytest.raises(ValidationError, match=rf"{field}.0.validation is 0.5: only a source of train is split"):
        DataConfig(**fields, **{field: [plain | {"validation": 0.5}]})
    split = DataConfig(**fields | {"train": [plain | {"validation": 0.5}]})
    assert [source.label for source in split.sources("validation")] == ["llava"]
    with pytest.raises(ValidationError, match="validation has two sources called 'llava'"):
        DataConfig(**fields | {"train": [plain | {"validation": 0.5}], "validation": [plain]})
