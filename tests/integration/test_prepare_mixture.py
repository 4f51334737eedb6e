"""Mixtures on a real Ray: weights, limits, duplicates across sources, and images of evaluation sets."""

from collections import Counter

import pytest

from pipelines import storage
from pipelines.config import DataConfig
from pipelines.prepare import PrepareError, prepare
from pipelines.reader import PackedDataset
from tests.benchmarks.studies.near_duplicates import DISGUISES, jpeg
from tests.helpers.corpora import conversation, write_files
from tests.helpers.images import encoded, scene

TOKENS_PER_IMAGE, SEED = 4, 7

pytestmark = pytest.mark.usefixtures("two_cpus")


def entry(name: str, image: int | None, answer: str = "") -> dict:
    shown = {} if image is None else {"image": f"{image}.png"}
    asked = "Who are you?" if image is None else "<image>\nWhat is this?"
    return {"id": name, **shown, "conversations": conversation(asked, answer or f"This is {image}.")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sources `a` and `b`, a validation set and two evaluation sets, which all name images of one folder."""
    a = [entry(f"a{i}", i) for i in range(20)]
    a += [entry("a3", 40), entry("again", 5), entry("text", None, "A model.")]  # an id, a content, and no image
    b = [entry(f"b{i}", i) for i in range(15, 30)]  # 15 to 19 are in `a` as well
    b += [entry("a0", 41), entry("text too", None, "A model."), entry("other words", 2, "Something else.")]
    validation = [entry(f"v{i}", i) for i in (7, 50, 51, 51)]
    test = [{"image_id": str(i), "question": "?", "answer": "!"} for i in (8, 26, 60)]
    more = [{"image_id": str(i), "question": "?", "answer": "!"} for i in (9, 26)]
    folder = tmp_path_factory.mktemp("corpus")
    lists = {"a.json": a, "b.json": b, "validation.json": validation, "test.json": test, "more.json": more}
    return write_files(folder, {**lists, **{f"{i}.png": encoded(i) for i in range(70)}})


def llava(root, name: str, **options) -> dict:
    return {"type": "llava", "name": name, "annotations": str(root / f"{name}.json"), "images": str(root)} | options


def questions(root, name: str) -> dict:
    return llava(root, name, type="questions", image_suffix=".png")


def config(root, train: list[dict], **changes) -> DataConfig:
    settings = {
        "train": train,
        "validation": [llava(root, "validation", repeated_ids="number")],
        "test": [questions(root, "test")],
        "exclude_images_of": [questions(root, "more")],
        "tokenizer": {"train_vocab_size": 300},
        "max_tokens": 64,
        "partition_records": 4,
        "shard_rows": 5,
        "max_quarantined": 0.1,
    }
    return DataConfig(**(settings | changes))


def kept(out: str) -> Counter:
    """How often each record is in the training rows."""
    rows, found = PackedDataset(out), Counter()
    for i in range(len(rows)):
        found.update(rows[i].sample_ids)
    return found


def set_aside(out: str) -> dict[tuple, str]:
    table = storage.open_arrow(f"{out}/quarantine.arrow").read_all().to_pylist()
    return {(row["split"], row["record_id"], row["reason"]): row["detail"] for row in table}


@pytest.fixture(scope="module")
def mixed(root, two_cpus, tmp_path_factory):
    """The folder and manifest of both sources."""
    out = str(tmp_path_factory.mktemp("set"))
    return out, prepare(config(root, [llava(root, "a"), llava(root, "b")]), out, TOKENS_PER_IMAGE, SEED)


def test_duplicates_and_images_of_evaluation_sets_are_set_aside_and_counted(mixed):
    out, manifest = mixed
    duplicates = {f"b{i}": f"a{i} of a" for i in range(15, 20)} | {"again": "a5 of a", "text too": "text of a"}
    expected = {("train", name, "duplicate_content"): f"the same images and text as {first}"
                for name, first in duplicates.items()}  # fmt: skip
    expected |= {
        ("train", "a3", "duplicate_id"): "the id of a3 of a",
        ("train", "a7", "contaminated"): "image 1 is one of validation/validation",
        ("train", "a8", "contaminated"): "image 1 is one of test/test",
        ("train", "b26", "contaminated"): "image 1 is one of test/test",
        ("train", "a9", "contaminated"): "image 1 is one of exclude_images_of.0/more",
        ("validation", "v51#2", "duplicate_content"): "the same images and text as v51 of validation",
    }
    assert set_aside(out) == expected
    train = manifest.splits["train"]
    assert train.quarantined == {"contaminated": 4, "duplicate_content": 7, "duplicate_id": 1}
    assert train.quarantined_by_source["b"] == {"contaminated": 1, "duplicate_content": 6}
    assert (train.records, train.samples) == (41, 29)
    assert manifest.splits["validation"].samples == 3  # its own image 7 stays: it is training that must not show it
    assert manifest.excluded == {"validation/validation": 3, "test/test": 3, "exclude_images_of.0/more": 1}
    names = kept(out)
    assert sum(names.values()) == 29
    assert {name: count for name, count in names.items() if count != 1} == {"a0": 2}  # an id of either source


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_digest_does_not_depend_on_the_partitions(mixed, root, tmp_path, size):
    again = config(root, [llava(root, "a"), llava(root, "b")], partition_records=size)
    manifest = prepare(again, str(tmp_path / "set"), TOKENS_PER_IMAGE, SEED)
    assert manifest.digest == mixed[1].digest
    assert manifest.model_dump(exclude={"created_by"}) == mixed[1].model_dump(exclude={"created_by"})


def test_both_checks_can_be_turned_off(root, tmp_path):
    out = str(tmp_path / "set")
    off = {"deduplicate": False, "exclude_evaluation_images": False, "exclude_images_of": []}
    manifest = prepare(config(root, [llava(root, "a"), llava(root, "b")], **off), out, TOKENS_PER_IMAGE, SEED)
    assert manifest.splits["train"].quarantined == {"duplicate_id": 1}
    assert manifest.excluded == {}


def test_weights_and_limits(root, tmp_path):
    out = str(tmp_path / "set")
    sources = [llava(root, "a", weight=2.5, limit=6), llava(root, "b", weight=0.5, limit=10)]
    manifest = prepare(config(root, sources, exclude_images_of=[]), out, TOKENS_PER_IMAGE, SEED)
    names = kept(out)
    assert sum(name.startswith("a") for name in names) == 6 + 6 + 3
    assert {name for name in names if name.endswith("@2")} == {f"a{i}@2" for i in range(6)}
    assert sum(name.startswith("b") for name in names) == 5
    assert manifest.splits["train"].quarantined == {}
    more = [llava(root, "a", weight=3, limit=6), llava(root, "b", weight=0.5, limit=10)]
    assert prepare(config(root, more), str(tmp_path / "3"), TOKENS_PER_IMAGE, SEED).splits["train"].samples == 23


def test_a_repeated_duplicate_is_removed_as_often_as_it_is_repeated(root, tmp_path):
    out = str(tmp_path / "set")
    prepare(config(root, [llava(root, "a"), llava(root, "b", weight=2)]), out, TOKENS_PER_IMAGE, SEED)
    names = kept(out)
    assert {"a15", "b15@2", "b20", "b20@2"} <= {*names}  # as often as the heaviest source asks for
    assert "b15" not in names


def test_an_evaluation_set_that_cannot_be_read_stops_the_run(root, tmp_path):
    gone = {"image_id": "none", "question": "?", "answer": "!"}
    write_files(tmp_path, {"gone.json": [gone], "bad.json": [gone | {"image_id": "8", "question": None}, gone]})
    for test, message in (
        (questions(root, "test") | {"annotations": str(tmp_path / "gone.json")}, r"test/test: record none: none\.png"),
        (
            questions(root, "test") | {"annotations": str(tmp_path / "bad.json")},
            r"test/test: record 8: malformed: quest",
        ),
    ):
        with pytest.raises(PrepareError, match=message + ".*repair it, or leave the set out"):
            prepare(config(root, [llava(root, "a")], test=[test]), str(tmp_path / "set"), TOKENS_PER_IMAGE, SEED)


def test_an_image_that_looks_like_one_of_an_evaluation_set_is_set_aside_with_its_twin(root, tmp_path):
    photographs = [scene(i) for i in range(30)]
    files = {f"{i}.jpg": jpeg(photographs[i]) for i in range(30)}
    shown = {0: "grey", 1: "mirrored", 2: "half the size", 3: "with text on it"}
    files |= {f"{30 + i}.jpg": DISGUISES[name](photographs[i]) for i, name in shown.items()}
    places = [*range(4, 20), *range(30, 34)]
    train = [entry(f"t{i}", i) | {"image": f"{i}.jpg"} for i in places]
    validation = [entry(f"v{i}", i) | {"image": f"{i}.jpg"} for i in (0, 20)]
    test = [{"image_id": f"{i}.jpg", "question": "?", "answer": "!"} for i in (1, 2, 3, 19)]
    write_files(tmp_path, files | {"train.json": train, "validation.json": validation, "test.json": test})
    sources = {
        "validation": [llava(tmp_path, "validation")],
        "test": [questions(tmp_path, "test") | {"image_suffix": ""}],
        "exclude_images_of": [],
    }
    recipe = config(tmp_path, [llava(tmp_path, "train")], **sources, similar_evaluation_images=0.8)
    manifest = prepare(recipe, str(tmp_path / "set"), TOKENS_PER_IMAGE, SEED)
    found = set_aside(str(tmp_path / "set"))
    texts = {name: (reason, text) for (_, name, reason), text in found.items()}
    assert texts.keys() == {"t19", "t30", "t31", "t32", "t33"}
    assert texts["t19"] == ("contaminated", "image 1 is one of test/test")
    for name, twin in (("t30", "v0 of validation/validation"), ("t31", "1.jpg of test/test")):
        reason, text = texts[name]
        assert reason == "near_contaminated"
        assert text.startswith("image 1 looks like the image of ")
        assert twin.split()[0] in text
        assert text.endswith(twin.split(" ", 1)[1])
    assert manifest.splits["train"].quarantined == {"contaminated": 1, "near_contaminated": 4}
    plain = config(tmp_path, [llava(tmp_path, "train")], **sources)
    assert prepare(plain, str(tmp_path / "plain"), TOKENS_PER_IMAGE, SEED).splits["train"].quarantined == {
        "contaminated": 1
    }
    one = config(tmp_path, [llava(tmp_path, "train")], **sources, similar_evaluation_images=0.8, partition_records=1)
    assert prepare(one, str(tmp_path / "one"), TOKENS_PER_IMAGE, SEED).digest == manifest.digest


class Killed(Exception):
    """Stands for the end of the driver."""


@pytest.mark.parametrize("phase", ["exclude", "deduplicate"])
def test_a_run_killed_between_the_passes_goes_on(mixed, root, tmp_path, phase):
    def kill(event):
        if event.phase == phase and event.done == event.total:
            raise Killed

    recipe, out, events = config(root, [llava(root, "a"), llava(root, "b")]), str(tmp_path / "set"), []
    with pytest.raises(Killed):
        prepare(recipe, out, TOKENS_PER_IMAGE, SEED, kill)
    with pytest.raises(FileNotFoundError, match="not finished"):
        PackedDataset(out)
    assert prepare(recipe, out, TOKENS_PER_IMAGE, SEED, events.append).digest == mixed[1].digest
    last = {event.phase: event for event in events}
    assert last["tokenize"].skipped == last["tokenize"].total
    assert last["exclude"].skipped == last["exclude"].total == 5


def test_nothing_left(root, tmp_path):
    entries = [entry("v7", 7)]
    write_files(tmp_path, {"only.json": entries})
    only = llava(root, "a") | {"annotations": str(tmp_path / "only.json")}
    with pytest.raises(
        PrepareError, match=r"train split: 1 were read \(contaminated: 1\); .* exclude_evaluation_images: false"
    ):
        prepare(config(root, [only]), str(tmp_path / "set"), TOKENS_PER_IMAGE, SEED)


def test_another_evaluation_set_makes_the_data_anew(mixed, root):
    """The last test: it changes the corpus."""
    sources = [llava(root, "a"), llava(root, "b")]
    events = []
    assert prepare(config(root, sources), mixed[0], TOKENS_PER_IMAGE, SEED, events.append) == mixed[1]
    assert {event.phase for event in events} == {"finished"}
    write_files(root, {"test.json": [{"image_id": str(i), "question": "?", "answer": "!"} for i in (8, 10, 60)]})
    manifest = prepare(config(root, sources), mixed[0], TOKENS_PER_IMAGE, SEED)
    assert ("train", "a10", "contaminated") in set_aside(mixed[0])
    assert manifest.digest != mixed[1].digest


def test_a_source_is_split_by_image_and_no_image_is_on_both_sides(root, tmp_path):
    out = str(tmp_path / "set")
    pairs = [entry(f"{k}{i}", i, f"{k} {i}") for k in "xy" for i in range(30)]  # two records about each image
    both = [entry("both", 0) | {"image": ["10.png", "11.png", "12.png", "13.png"]}]
    both[0]["conversations"][0]["value"] = "<image><image><image><image>\nWhich?"
    write_files(root, {"pairs.json": pairs + both, "more pairs.json": [entry(f"z{i}", i, f"z {i}") for i in range(30)]})
    sources = [llava(root, "pairs", validation=0.3, weight=2), llava(root, "more pairs")]
    off = {"exclude_evaluation_images": False, "exclude_images_of": [], "validation": [], "test": []}
    manifest = prepare(config(root, sources, **off), out, TOKENS_PER_IMAGE, SEED)
    rows = PackedDataset(out, "validation")
    held = {name for i in range(len(rows)) for name in rows[i].sample_ids} - {"both"}
    assert {name[1:] for name in held if name[0] == "x"} == {name[1:] for name in held if name[0] == "y"}
    assert 2 * 4 <= len(held) <= 2 * 15
    shown = {name[1:].partition("@")[0] for name in kept(out) if name[0] in "xyz"}
    assert shown == {str(i) for i in range(30)} - {name[1:] for name in held}  # of neither source
    counts = manifest.splits["train"].quarantined
    assert counts["contaminated"] >= len(held) // 2
    assert manifest.splits["train"].records == 2 * (61 - manifest.splits["validation"].records) + 30
    again = config(root, sources, partition_records=1000, **off)
    assert prepare(again, str(tmp_path / "again"), TOKENS_PER_IMAGE, SEED).digest == manifest.digest


def test_a_share_that_holds_out_nothing_is_one_line(root, tmp_path):
    sources = [llava(root, "a", validation=0.000001)]
    with pytest.raises(PrepareError, match=r"no records are left in the validation split: 0 were read .*`validation`"):
        prepare(config(root, sources, validation=[]), str(tmp_path / "set"), TOKENS_PER_IMAGE, SEED)
