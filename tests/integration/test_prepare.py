"""The whole preparation on a real Ray: a small LLaVA-layout corpus, with damage, to shards that others can open."""

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image
from transformers import AutoTokenizer

from mlmamba.conversation import IGNORE_INDEX
from mlmamba.image_layout import ImageLayout
from pipelines.config import DataConfig
from pipelines.inspect import inspect_data, report
from pipelines.manifest import Manifest
from pipelines.prepare import PrepareError, prepare
from pipelines.reader import PackedDataset, batches, collate
from pipelines.verify import verify
from tests.helpers.corpora import write_tar
from tests.helpers.images import encoded

MAX_TOKENS, TOKENS_PER_IMAGE, SEED = 160, 9, 7
TRAIN, VALIDATION = 60, 12
# One record each of the 60 has this wrong with it.
DAMAGE = {
    3: "image_truncated",
    8: "image_unreadable",
    13: "image_missing",
    21: "image_bomb",
    22: "image_aspect",
    29: "image_format",
    34: "role_order",
    35: "malformed",
    40: "placeholder_mismatch",
    47: "duplicate_id",
    50: "empty_turn",
    55: "too_long",
}
CUT = 58  # a conversation of which only the beginning fits

pytestmark = pytest.mark.usefixtures("two_cpus")


def write_corpus(root: Path) -> None:
    """Annotations for both splits and a folder of images."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    entries = []
    for i in range(TRAIN + VALIDATION):
        pixels = rng.integers(0, 255, (24, 24 + i % 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        words = " ".join(["small"] * int(rng.integers(1, 12)))
        entries.append(
            {
                "id": f"record-{i}",
                "image": f"{i}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhat is in image {i}?"},
                    {"from": "gpt", "value": f"A {words} square."},
                ],
            }
        )
    _damage(root / "images", entries)
    (root / "train.json").write_text(json.dumps(entries[:TRAIN]))
    (root / "validation.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries[TRAIN:]))


def _damage(images: Path, entries: list[dict]) -> None:
    of = {reason: i for i, reason in DAMAGE.items()}
    whole = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(whole[: len(whole) // 2])
    (images / "8.png").write_text("not an image")
    (images / "13.png").unlink()
    header = io.BytesIO()  # 100 million white pixels compress to a few kilobytes
    Image.new("1", (10_000, 10_000), 1).save(header, "PNG")
    (images / "21.png").write_bytes(header.getvalue())
    Image.new("RGB", (100, 4)).save(images / "22.png")
    Image.new("RGB", (8, 8)).save(images / "29.png", "TIFF")
    entries[of["role_order"]]["conversations"].reverse()
    entries[of["malformed"]]["conversations"][1]["from"] = "system"
    entries[of["placeholder_mismatch"]]["conversations"][0]["value"] = "What?"
    entries[of["duplicate_id"]]["id"] = "record-0"
    entries[of["empty_turn"]]["conversations"][1]["value"] = " "
    entries[of["too_long"]]["conversations"][1]["value"] = "small " * 500
    more = [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "The same small square."}]
    entries[CUT]["conversations"] += more * 20


def config(root: Path, **changes) -> DataConfig:
    def source(name: str) -> dict:
        return {"type": "llava", "annotations": str(root / name), "images": str(root / "images")}

    settings = {
        "train": [source("train.json")],
        "validation": [source("validation.jsonl")],
        "tokenizer": {"train_vocab_size": 300},
        "max_tokens": MAX_TOKENS,
        "partition_records": 10,
        "shard_rows": 5,
        "max_quarantined": 0.5,
    }
    return DataConfig(**(settings | changes))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root)
    return root


@pytest.fixture(scope="module")
def prepared(corpus, two_cpus, tmp_path_factory) -> tuple[str, Manifest, list]:
    """The data set, its manifest and the progress events of making it."""
    out, events = str(tmp_path_factory.mktemp("set") / "data"), []
    return out, prepare(config(corpus), out, TOKENS_PER_IMAGE, SEED, events.append), events


def read_quarantine(out: str) -> dict[str, str]:
    with pa.memory_map(f"{out}/quarantine.arrow") as file:
        rows = pa.ipc.open_file(file).read_all().to_pylist()
    assert {(row["split"], row["source"]) for row in rows} == {("train", "llava")}
    assert all(row["detail"] for row in rows)
    return {row["record_id"]: row["reason"] for row in rows}


def test_the_folder_and_its_manifest(prepared):
    out, manifest, _ = prepared
    assert {path.name for path in Path(out).iterdir()} == {"manifest.json", "quarantine.arrow", "shards", "tokenizer"}
    assert Manifest.load(out) == manifest
    assert {path.name for path in Path(out, "shards").iterdir()} == {Path(s.path).name for s in manifest.shards}
    assert verify(out) == []
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    assert train.quarantined == dict(sorted(Counter(DAMAGE.values()).items()))
    assert train.quarantined_by_source == {"llava": train.quarantined}
    assert (train.records, train.samples, train.cut) == (TRAIN, TRAIN - len(DAMAGE), 1)
    assert train.cut_turns > 2
    assert manifest.excluded == {"validation/llava": VALIDATION}
    assert (validation.records, validation.samples, validation.quarantined) == (VALIDATION, VALIDATION, {})
    assert train.images == train.samples_by_source["llava"] == train.samples
    assert train.without_images == validation.without_images == 0
    assert manifest.without_images() == f"0 of {train.samples} training samples show no image"
    assert train.fill > 0.8


def test_every_bad_record_is_in_the_table_with_its_reason(prepared):
    expected = {f"record-{i}": reason for i, reason in DAMAGE.items() if reason != "duplicate_id"}
    assert read_quarantine(prepared[0]) == expected | {"record-0": "duplicate_id"}


def test_shards_open_with_pyarrow_and_hold_the_samples(prepared, corpus):
    out, manifest, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(f"{out}/tokenizer")
    seen = []
    for shard in manifest.splits["train"].shards:
        with pa.memory_map(f"{out}/{shard.path}") as file:
            rows = pa.ipc.open_file(file).read_all().to_pylist()
        assert len(rows) == shard.rows
        for row in rows:
            assert len(row["input_ids"]) == len(row["labels"]) == len(row["seq_idx"]) <= MAX_TOKENS
            assert len(row["images"]) == len(row["image_positions"])
            seq_idx = np.array(row["seq_idx"])
            for k, name in enumerate(row["sample_ids"]):
                at = np.flatnonzero(seq_idx == k)
                assert row["labels"][at[0]] == IGNORE_INDEX
                assert row["image_positions"][k] == at[0]
                i = int(name.split("-")[1])
                assert row["images"][k] == (corpus / "images" / f"{i}.png").read_bytes()
                text = tokenizer.decode(np.array(row["input_ids"])[at])
                head = "<image>" * TOKENS_PER_IMAGE + f"<|user|>\nWhat is in image {i}?<|endoftext|>\n<|assistant|>\nA"
                assert text.startswith(head)
                assert text.endswith("square.<|endoftext|>")
            seen += row["sample_ids"]
    assert sorted(seen) == sorted(f"record-{i}" for i in range(TRAIN) if i not in DAMAGE)


def test_shards_open_with_datasets(prepared, tmp_path):
    from datasets import load_dataset

    out, manifest, _ = prepared
    files = {split: f"{out}/shards/{split}-*.arrow" for split in manifest.splits}
    loaded = load_dataset("arrow", data_files=files, cache_dir=str(tmp_path))
    for split, info in manifest.splits.items():
        assert len(loaded[split]) == info.rows
        row = PackedDataset(out, split)[1]
        assert loaded[split][1]["input_ids"] == row.input_ids.tolist()
        assert loaded[split][1]["images"] == row.images


def test_a_step_of_training_data(prepared):
    rows = next(batches(PackedDataset(prepared[0]), SEED, 2, 0, 1))
    batch = collate(rows, MAX_TOKENS, pad_id=0, layout=ImageLayout(image_size=16))
    assert batch["pixel_values"].shape == (sum(len(row.images) for row in rows), 3, 16, 16)
    image_tokens = (batch["input_ids"] == 3).sum()  # the trained tokenizer has <image> at 3
    assert image_tokens == TOKENS_PER_IMAGE * len(batch["pixel_values"])


def test_progress(prepared):
    events = prepared[2]
    assert list(dict.fromkeys(event.phase for event in events)) == [
        "tokenizer",
        "records",
        "tokenize",
        "deduplicate",
        "pack",
        "finished",
    ]
    total = TRAIN + VALIDATION
    for phase, bad in (("tokenize", len(DAMAGE) - 1), ("deduplicate", len(DAMAGE))):  # an id twice shows in the latter
        last = [event for event in events if event.phase == phase][-1]
        assert (last.done, last.total, last.quarantined, last.skipped) == (total, total, bad, 0)


def test_a_second_call_returns_the_finished_set_untouched(prepared, corpus):
    out, manifest, _ = prepared
    before = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")}
    events = []
    # Neither the size of the partitions nor the limit on bad records changes the content.
    again = prepare(
        config(corpus, partition_records=3, max_quarantined=0.9), out, TOKENS_PER_IMAGE, SEED, events.append
    )
    assert again == manifest
    assert [(event.phase, event.skipped) for event in events] == [("finished", manifest.rows)]
    assert {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")} == before


class Killed(Exception):
    """Stands for the end of the driver."""


def kill_at(phase: str, done: int):
    def on_progress(event):
        if event.phase == phase and event.done >= done:
            raise Killed

    return on_progress


def last_skips(events) -> dict[str, int]:
    return {event.phase: event.skipped for event in events}


def test_a_killed_run_redoes_only_what_is_missing(prepared, corpus, tmp_path):
    out, manifest = str(tmp_path / "data"), prepared[1]
    with pytest.raises(Killed):
        prepare(config(corpus), out, TOKENS_PER_IMAGE, SEED, kill_at("pack", 10))
    with pytest.raises(FileNotFoundError, match="not finished"):
        PackedDataset(out)
    tokens = Path(out, "work/tokens")
    kept = {path: path.stat().st_mtime_ns for path in tokens.iterdir()}
    assert len(kept) == 8

    events = []  # killed while packing: all tokens and the first shards are there
    with pytest.raises(Killed):
        prepare(config(corpus), out, TOKENS_PER_IMAGE, SEED, lambda e: (events.append(e), kill_at("pack", 12)(e)))
    assert last_skips(events)["tokenize"] == TRAIN + VALIDATION
    assert last_skips(events)["pack"] >= 10
    assert {path: path.stat().st_mtime_ns for path in tokens.iterdir()} == kept

    for name in ("train-00001", "train-00004"):
        (tokens / f"{name}.arrow").unlink()
    events = []
    again = prepare(config(corpus), out, TOKENS_PER_IMAGE, SEED, events.append)
    assert last_skips(events)["tokenize"] == TRAIN + VALIDATION - 20
    assert again == manifest


def test_another_recipe_replaces_the_set(prepared, corpus, tmp_path):
    out, manifest = str(tmp_path / "data"), prepared[1]
    small = config(corpus, train=[dict(config(corpus).train[0], limit=12)], validation=[])
    first = prepare(config(corpus), out, TOKENS_PER_IMAGE, SEED)
    second = prepare(small, out, TOKENS_PER_IMAGE, SEED)
    assert first.digest == manifest.digest != second.digest
    assert second.splits["train"].records == 12
    assert {path.name for path in Path(out, "shards").iterdir()} == {Path(s.path).name for s in second.shards}


def test_too_many_bad_records_fail_and_are_looked_at_again(corpus, tmp_path):
    root, out = tmp_path / "corpus", str(tmp_path / "data")
    write_corpus(root)
    with pytest.raises(
        PrepareError, match=r"records were set aside \(.*image_.*: 1.*max_quarantined = 0\.01 a"
    ) as error:
        prepare(config(root, max_quarantined=0.01), out, TOKENS_PER_IMAGE, SEED)
    assert "allows at most 0 of 72" in str(error.value)
    examples = dict(line.strip().split(": ", 1) for line in str(error.value).splitlines()[1:-1])
    assert examples.keys() <= {*DAMAGE.values()}
    for reason, example in examples.items():
        number = next(i for i, own in DAMAGE.items() if own == reason)
        assert example.startswith(f"record-{number} of llava: ")
    found = inspect_data(out)
    assert found["unfinished"]
    assert {entry["reason"] for entry in found["quarantine"]} == examples.keys()
    assert "not finished" in report(found)
    assert read_quarantine(out)
    assert not Path(out, "manifest.json").exists()
    Image.new("RGB", (8, 8)).save(root / "images" / "13.png")
    manifest = prepare(config(root), out, TOKENS_PER_IMAGE, SEED)
    assert manifest.splits["train"].quarantined.keys() == {*DAMAGE.values()} - {"image_missing"}


def test_a_shard_that_is_cut_off_fails_by_the_share_that_is_lost(tmp_path):
    members = [
        (f"{i}.{kind}", content) for i in range(20) for kind, content in (("png", encoded(i)), ("txt", f"No {i}."))
    ]
    whole = write_tar(tmp_path / "s-0.tar", members).read_bytes()
    write_tar(tmp_path / "s-1.tar", members)
    (tmp_path / "s-0.tar").write_bytes(whole[: len(whole) * 3 // 10])
    shards = {"type": "webdataset", "shards": str(tmp_path / "s-*.tar"), "caption": "txt"}
    settings = {"train": [shards], "tokenizer": {"train_vocab_size": 300}, "max_tokens": 64, "deduplicate": False}
    out = str(tmp_path / "set")
    # Three of the 27 records that are left have something wrong with them: by that count alone it would pass.
    with pytest.raises(
        PrepareError, match=r"source 'webdataset' \(train\) lost 3\d\.\d+% of its bytes, .*s-0\.tar: no end"
    ):
        prepare(DataConfig(**settings, max_quarantined=0.3), out, 4, SEED)
    manifest = prepare(DataConfig(**settings, max_quarantined=0.4), out, 4, SEED)
    assert 0.33 < manifest.splits["train"].lost["webdataset"] < 0.38
    assert 25 <= manifest.splits["train"].samples <= 28


def test_no_records_left(corpus, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    empty = dict(config(corpus).train[0], annotations=str(tmp_path / "none.json"))
    with pytest.raises(PrepareError, match="no records are left in the validation split"):
        prepare(config(corpus, validation=[empty]), str(tmp_path / "data"), TOKENS_PER_IMAGE, SEED)


def test_a_folder_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PrepareError, match=r"cannot write to .*file/data"):
        prepare(config(corpus), str(tmp_path / "file" / "data"), TOKENS_PER_IMAGE, SEED)


def test_an_image_that_fills_the_row(corpus, tmp_path):
    with pytest.raises(ValueError, match="an image takes 160 tokens and a row has 160"):
        prepare(config(corpus), str(tmp_path), MAX_TOKENS, SEED)


OTHER_MACHINE = """
import sys
from functools import partial
import ray
from pipelines.config import DataConfig
from pipelines.prepare import prepare
ray.init = partial(ray.init, "local", num_cpus=1)
print(prepare(DataConfig.model_validate_json(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])).digest)
"""


def test_the_digest_does_not_depend_on_the_machines(prepared, corpus, tmp_path):
    """One CPU, other partitions, and a Ray that prepare starts by itself, quietly. (The last test: it ends ours.)"""
    ray.shutdown()
    other = config(corpus, partition_records=7).model_dump_json()
    arguments = [other, str(tmp_path / "data"), str(TOKENS_PER_IMAGE), str(SEED)]
    result = subprocess.run(
        [sys.executable, "-c", OTHER_MACHINE, *arguments], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == prepared[1].digest, result.stderr
    assert result.stderr == ""
