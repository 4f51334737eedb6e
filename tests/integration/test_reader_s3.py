"""Training data streamed from an object store: the rows of the local set, in bounded memory, a request a row."""

import io
import itertools
import logging

import numpy as np
import pyarrow as pa
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image
from pyarrow import fs

from mlmamba.image_layout import ImageLayout
from pipelines import packed, storage
from pipelines.contact_sheet import draw_sheet
from pipelines.inspect import inspect_data
from pipelines.reader import PackedDataset, collate, prefetch, step_indices
from pipelines.verify import verify
from tests.helpers import packed_set
from tests.helpers.packed_set import MAX_TOKENS, write_packed_set

ALLOWANCE = 3 << 20  # bytes; the set has three times as many


def large_image(i: int) -> bytes:
    """Noise, which PNG does not compress: 60 kilobytes."""
    pixels = np.random.default_rng(i).integers(0, 256, (140, 140, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_set, "image_of", large_image)
        write_packed_set(out, {"train": 165})
    return str(out)


@pytest.fixture(scope="module")
def requests() -> list[str]:
    """The log lines of the store, one per request."""
    lines = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger = logging.getLogger("werkzeug")
    handler = Handler()
    logger.addHandler(handler)
    logger.propagate = False
    yield lines
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def store(local, requests) -> str:
    """The same set behind an s3:// URI, on a server of its own."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "reader")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        address = "http%3A%2F%2F{}%3A{}".format(*server.get_host_and_port())
        uri = f"s3://corpus/set?endpoint_override={address}&region=us-east-1&allow_bucket_creation=true"
        filesystem, path = fs.FileSystem.from_uri(uri)
        filesystem.create_dir("corpus")
        fs.copy_files(local, path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)
        yield uri
    server.stop()


def test_a_stream_larger_than_the_allowance_stays_within_it(local, store):
    size = sum(shard.bytes for shard in PackedDataset(local).manifest.shards)
    assert size > 3 * ALLOWANCE
    dataset, here = PackedDataset(store), PackedDataset(local)

    def make(rows):
        return collate(dataset.rows(rows), MAX_TOKENS, 0, ImageLayout(image_size=16))

    before, peak, read = pa.total_allocated_bytes(), 0, 0
    plain = step_indices(here, 0, 2, 0, 1)
    stream = prefetch(make, step_indices(dataset, 0, 2, 0, 1), threads=3)
    for rows, batch in zip(itertools.islice(plain, len(here) // 2), stream, strict=False):
        expected = collate(here.rows(rows), MAX_TOKENS, 0, ImageLayout(image_size=16))
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        peak = max(peak, pa.total_allocated_bytes() - before)
        read += len(rows)
    stream.close()
    assert read == len(here) - len(here) % 2
    assert 0 < peak < ALLOWANCE


def test_a_row_is_one_request(store, requests):
    dataset = PackedDataset(store)
    for row in range(len(dataset)):
        dataset[row]  # every shard is open now
    before = len(requests)
    for row in range(10, 20):
        dataset[row]
    assert len(requests[before:]) == 10
    assert all("GET /corpus/set/shards/" in line for line in requests[before:])


def test_no_more_shards_are_open_than_allowed(local, monkeypatch):
    def mapped() -> int:
        with open("/proc/self/maps") as file:
            return len({line.split()[-1] for line in file if local in line})

    monkeypatch.setattr(packed, "OPEN_SHARDS", 5)
    dataset = PackedDataset(local)
    assert len(dataset.manifest.shards) > 5
    before = mapped()
    for row in range(len(dataset)):
        dataset[row]
    assert mapped() - before <= 5


def test_inspect_and_verify_read_a_store(local, store, requests, tmp_path):
    here, there = inspect_data(local), inspect_data(store)
    assert {**there, "uri": ""} == {**here, "uri": ""}
    before = pa.total_allocated_bytes()
    draw_sheet(store, str(tmp_path / "sheet.png"), count=3)
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    assert verify(store) == []
    assert pa.total_allocated_bytes() - before < ALLOWANCE
    shard = storage.join(store, "shards/train-00001.arrow")
    good = storage.read_bytes(shard)
    storage.write_atomic(shard, good[:-1])
    assert verify(store) == [
        f"shards/train-00001.arrow is cut off: it has {len(good) - 1} bytes, the manifest says {len(good)}"
    ]
    storage.delete(shard)
    assert verify(store) == ["shards/train-00001.arrow is missing"]
    storage.write_atomic(shard, good)
