"""A finished data set: its manifest, the order of its rows, resuming, and the tensors of a step."""

import io
import itertools
import shutil
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from mlmamba.conversation import IGNORE_INDEX
from mlmamba.image_colours import PIXELS
from mlmamba.image_layout import ImageLayout
from mlmamba.images import load_pixels
from pipelines import storage
from pipelines.manifest import SCHEMA_VERSION, Manifest, ShardInfo, split_info
from pipelines.reader import PackedDataset, batches, collate, prefetch, step_indices
from pipelines.schema import PACKED, one_row
from tests.helpers.images import encoded

MAX_TOKENS = 12


def packed_row(i: int) -> dict:
    """Row i: two samples of 4 and 2 + i % 5 tokens, the first with an image."""
    n = 6 + i % 5
    return {
        "sample_ids": [f"{i}a", f"{i}b"],
        "input_ids": np.arange(n, dtype=np.int32) + 10 * i,
        "labels": np.array([IGNORE_INDEX] * 4 + [7] * (n - 4), dtype=np.int32),
        "seq_idx": np.array([0] * 4 + [1] * (n - 4), dtype=np.int32),
        "images": [encoded(i)],
        "image_positions": [0],
        "source": ["s", "t"],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A data set of 23 rows in shards of 10, written by hand."""
    out = str(tmp_path_factory.mktemp("set"))
    shards = []
    for index, start in enumerate((0, 10, 20)):
        rows = [packed_row(i) for i in range(start, min(start + 10, 23))]
        path = f"shards/train-{index:05d}.arrow"
        table = pa.Table.from_batches([one_row(PACKED, row) for row in rows])
        storage.write_table(storage.join(out, path), table)
        size, sha256 = storage.checksum(storage.join(out, path))
        shards.append(
            ShardInfo(
                path=path,
                rows=len(rows),
                samples=2 * len(rows),
                tokens=sum(len(row["input_ids"]) for row in rows),
                loss_tokens=1,
                images=len(rows),
                bytes=size,
                sha256=sha256,
                samples_by_source={"s": len(rows), "t": len(rows)},
            )
        )
    storage.write_atomic(storage.join(out, "tokenizer", "tokenizer.json"), b"{}")
    manifest = Manifest(
        digest="",
        tokenizer_digest=storage.checksum(storage.join(out, "tokenizer/tokenizer.json"))[1],
        recipe_digest="",
        sources={},
        max_tokens=MAX_TOKENS,
        tokens_per_image=2,
        splits={"train": split_info(shards, MAX_TOKENS, 46, {"too_long": 0}, 0)},
    )
    manifest.digest = manifest.content_digest()
    manifest.save(out)
    return out


class TestManifest:
    def test_totals(self, folder):
        train = Manifest.load(folder).splits["train"]
        assert (train.rows, train.samples, train.images) == (23, 46, 23)
        assert train.samples_by_source == {"s": 23, "t": 23}
        assert train.fill == pytest.approx(train.tokens / (23 * MAX_TOKENS), abs=1e-6)

    def test_without_one_there_is_no_data_set(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no manifest\.json under .*: the data set is not finished; run"):
            Manifest.load(str(tmp_path))
        (tmp_path / "manifest.json").write_text("{}")
        with pytest.raises(ValueError, match="is not a manifest"):
            Manifest.load(str(tmp_path))

    def test_another_schema_version(self, folder, tmp_path):
        Manifest.load(folder).model_copy(update={"schema_version": SCHEMA_VERSION + 1}).save(str(tmp_path))
        with pytest.raises(ValueError, match=f"has schema version {SCHEMA_VERSION + 1}, expected {SCHEMA_VERSION}"):
            Manifest.load(str(tmp_path))

    def test_what_a_model_sees_depends_on_the_rules_of_colour(self, folder):
        before = Manifest.load(folder)
        assert before.pixels == 1  # it does not say, as sets of earlier versions
        assert before.training_digest == before.digest
        later = before.model_copy(update={"pixels": PIXELS})
        assert later.content_digest() == before.digest
        assert later.training_digest != later.digest


class TestDataset:
    def test_rows_across_shards(self, folder):
        dataset = PackedDataset(folder)
        assert len(dataset) == 23
        for i in (0, 9, 10, 22):
            row, expected = dataset[i], packed_row(i)
            assert row.sample_ids == expected["sample_ids"]
            assert row.images == expected["images"]
            assert row.source == ["s", "t"]
            for name in ("input_ids", "labels", "seq_idx", "image_positions"):
                assert np.array_equal(getattr(row, name), expected[name])
            assert row.input_ids.dtype == np.int32
        for i in (-1, 23):
            with pytest.raises(IndexError, match=f"row {i} of a data set of 23 rows"):
                dataset[i]

    def test_a_split_that_is_not_there(self, folder):
        with pytest.raises(ValueError, match=r"no split 'validation', it has train: give the recipe data\.validation"):
            PackedDataset(folder, "validation")
        with pytest.raises(ValueError, match=r"has no split 'test', it has train$"):
            PackedDataset(folder, "test")

    def test_order(self, folder):
        dataset = PackedDataset(folder)
        orders = [dataset.order(seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
        assert all(sorted(order) == list(range(23)) for order in orders)
        assert len({tuple(order) for order in orders}) == 3
        assert PackedDataset(folder).order(0, 1).tolist() == orders[1]


def first_ids(iterator, steps: int) -> list[list[str]]:
    return [[row.sample_ids[0] for row in rows] for rows in itertools.islice(iterator, steps)]


class TestBatches:
    def test_ranks_share_each_step_and_an_epoch_repeats_nothing(self, folder):
        dataset = PackedDataset(folder)
        ranks = [first_ids(batches(dataset, 0, 3, rank, 2), 6) for rank in range(2)]
        for epoch in (0, 3):  # 23 rows give three steps of six
            seen = [name for rank in ranks for rows in rank[epoch : epoch + 3] for name in rows]
            assert len(seen) == len({*seen}) == 18
        assert ranks[0][:3] != ranks[0][3:]
        one = first_ids(batches(dataset, 0, 6, 0, 1), 6)
        assert one == [a + b for a, b in zip(*ranks, strict=True)]  # the step's rows do not depend on the split of work

    def test_resuming_gives_what_an_uninterrupted_run_gives(self, folder):
        dataset = PackedDataset(folder)
        whole = first_ids(batches(dataset, 4, 2, 1, 2), 14)
        for start in range(14):
            assert first_ids(batches(dataset, 4, 2, 1, 2, start_step=start), 14 - start) == whole[start:]

    def test_resuming_reads_only_its_own_rows(self, folder, monkeypatch):
        dataset = PackedDataset(folder)
        reads = []
        get = PackedDataset.__getitem__
        monkeypatch.setattr(PackedDataset, "__getitem__", lambda self, i: reads.append(i) or get(self, i))
        next(batches(dataset, 0, 2, 0, 1, start_step=1000))
        assert len(reads) == 2

    def test_too_few_rows(self, folder):
        with pytest.raises(ValueError, match="3 ranks x 8 rows = 24 rows, the data set has 23"):
            batches(PackedDataset(folder), 0, 8, 0, 3)

    def test_numbers_that_make_no_sense(self, folder):
        with pytest.raises(ValueError, match="rank=2 of 2"):
            batches(PackedDataset(folder), 0, 8, 2, 2)


class TestCollate:
    def test_shapes_and_padding(self, folder):
        dataset = PackedDataset(folder)
        rows = [dataset[0], dataset[4]]
        batch = collate(rows, MAX_TOKENS, pad_id=0, layout=ImageLayout(image_size=5))
        assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
            "input_ids": ((2, 12), torch.int64),
            "labels": ((2, 12), torch.int64),
            "seq_idx": ((2, 12), torch.int32),
            "attention_mask": ((2, 12), torch.bool),
            "pixel_values": ((2, 3, 5, 5), torch.uint8),
        }
        assert batch["attention_mask"].sum(1).tolist() == [6, 10]
        assert batch["input_ids"][0].tolist() == [0, 1, 2, 3, 4, 5] + [0] * 6
        assert batch["labels"][0].tolist() == [-100] * 4 + [7, 7] + [-100] * 6
        assert batch["seq_idx"][0].tolist() == [0] * 4 + [1] * 2 + [2] * 6
        expected = np.stack([load_pixels(encoded(i), 5) for i in (0, 4)])
        assert np.array_equal(batch["pixel_values"].numpy(), expected)

    def test_images_are_read_by_the_rules_that_the_set_was_prepared_under(self, folder, tmp_path):
        clear = Image.new("RGBA", (5, 5), (255, 0, 0, 0))  # red, and nothing of it is to be seen
        buffer = io.BytesIO()
        clear.save(buffer, "PNG")
        for version, colour in ((1, [255, 0, 0]), (PIXELS, [255, 255, 255])):
            uri = shutil.copytree(folder, tmp_path / str(version))
            Manifest.load(folder).model_copy(update={"pixels": version}).save(str(uri))
            row = PackedDataset(str(uri))[0]
            row.images[:] = [buffer.getvalue()]
            assert (
                collate([row], MAX_TOKENS, 0, ImageLayout(image_size=5))["pixel_values"][0, :, 0, 0].tolist() == colour
            )

    def test_no_images(self, folder):
        row = PackedDataset(folder)[0]
        row.images.clear()
        assert collate([row], MAX_TOKENS, 0, ImageLayout(image_size=5))["pixel_values"].shape == (0, 3, 5, 5)

    def test_a_row_that_is_too_long(self, folder):
        with pytest.raises(ValueError, match="a row has 6 tokens, over max_tokens = 5"):
            collate([PackedDataset(folder)[0]], 5, 0, ImageLayout(image_size=5))


class TestPrefetch:
    def test_order_and_end(self):
        def slow_when_early(i):
            time.sleep(0.02 if i % 4 == 0 else 0)
            return i

        assert list(prefetch(slow_when_early, range(40), threads=4)) == list(range(40))
        assert list(prefetch(slow_when_early, [])) == []

    def test_errors_reach_the_consumer_in_their_place(self):
        def work(i):
            if i == 2:
                raise KeyError("broken")
            time.sleep(0.05)
            return i

        ahead = prefetch(work, range(10), threads=3)
        assert [next(ahead), next(ahead)] == [0, 1]
        with pytest.raises(KeyError, match="broken"):
            next(ahead)

    def test_it_works_ahead_in_several_threads_but_not_further_than_asked(self):
        made, threads, together = [], set(), threading.Barrier(2)

        def work(i):
            together.wait(timeout=10)  # broken unless two results are made at once
            made.append(i)
            threads.add(threading.current_thread())
            return i

        ahead = prefetch(work, itertools.count(), threads=2, depth=3)
        assert next(ahead) == 0
        time.sleep(0.3)
        assert sorted(made) == [0, 1, 2, 3]  # one given, three ahead
        assert len(threads) == 2
        assert threading.current_thread() not in threads
        ahead.close()
        for thread in threads:
            thread.join(timeout=5)
            assert not thread.is_alive()

    def test_closing_it_drops_what_was_not_begun(self):
        begun = []

        def work(i):
            begun.append(i)
            time.sleep(0.05)

        ahead = prefetch(work, range(100), threads=1, depth=50)
        next(ahead)
        ahead.close()
        time.sleep(0.3)
        assert len(begun) <= 3

    def test_rows_read_and_decoded_in_threads_are_those_of_a_plain_loop(self, folder):
        dataset = PackedDataset(folder)

        def make(rows):
            return collate(dataset.rows(rows), MAX_TOKENS, 0, ImageLayout(image_size=5))

        plain = itertools.islice(map(make, step_indices(dataset, 3, 2, 0, 1)), 40)
        ahead = prefetch(make, step_indices(dataset, 3, 2, 0, 1), threads=4)
        for one, other in zip(plain, ahead, strict=False):
            assert all(torch.equal(one[name], other[name]) for name in one)

    def test_numbers_that_make_no_sense(self):
        with pytest.raises(ValueError, match="0 threads"):
            prefetch(str, [], threads=0)
        with pytest.raises(ValueError, match="depth 0"):
            prefetch(str, [], depth=0)
