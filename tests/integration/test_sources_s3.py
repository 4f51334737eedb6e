"""Every kind of source from a real S3 server, prepared on a real Ray into the same server: as from a local disk."""

import json
import random

import pyarrow as pa
import pytest
import ray

from pipelines import storage
from pipelines.config import DataConfig, TokenizerConfig
from pipelines.manifest import Manifest
from pipelines.packed import PackedDataset
from pipelines.prepare import prepare
from pipelines.sources import open_source
from pipelines.sources.files import _BLOCK
from pipelines.tokenizer import load_or_train, save
from pipelines.verify import verify
from tests.helpers.corpora import conversation, write_files, write_parquet, write_tar, write_zip
from tests.helpers.images import encoded
from tests.helpers.s3 import counted, running_s3

COUNT = 12
TOKENS_PER_IMAGE, SEED = 4, 7


@pytest.fixture(scope="module")
def s3():
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def two_cpus(s3):
    ray.shutdown()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def write_corpus(root) -> None:
    """The same kind of records in every layout; the images differ, so that nothing is a duplicate."""
    kinds = ("folder", "zip", "questions", "captions", "tar", "parquet")
    images = {kind: {f"{i:02}.png": encoded(100 * k + i) for i in range(COUNT)} for k, kind in enumerate(kinds)}
    texts = [conversation(f"<image>\nWhich one is {i}?", f"Number {i}.") for i in range(COUNT)]
    for kind in ("folder", "zip"):
        entries = [{"id": str(i), "image": f"{i:02}.png", "conversations": texts[i]} for i in range(COUNT)]
        write_files(root, {f"{kind}/a.json": entries})
    write_files(root / "folder/images", images["folder"])
    write_zip(root / "zip/images.zip", images["zip"])
    asked = [{"image_id": f"{i:02}", "question": f"Which is {i}?", "answer": f"It is {i}."} for i in range(COUNT)]
    write_files(root, {"questions/q.jsonl": "\n".join(map(json.dumps, asked))})
    write_files(root / "questions/images", images["questions"])
    rows = "".join(f"{i:02}.png\tThe caption {i}.\n" for i in range(COUNT))
    write_files(root, {"captions/t.tsv": "image\tcaption\n" + rows})
    write_files(root / "captions/images", images["captions"])
    for shard in range(3):
        members = []
        for i in range(4 * shard, 4 * shard + 4):
            members += [(f"{i:02}.png", images["tar"][f"{i:02}.png"]), (f"{i:02}.txt", f"A caption {i}.")]
        write_tar(root / f"tar/s-{shard:03}.tar", members)
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    message = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema([("image", cell), ("conversations", pa.list_(message))])
    columns = {
        "image": [{"bytes": data, "path": name} for name, data in images["parquet"].items()],
        "conversations": texts,
    }
    write_parquet(root / "parquet/train-00000.parquet", columns, schema, rows=5)


def sources(at) -> list[dict]:
    """The configs; `at` makes a path or URI of a name."""

    def llava(kind, images):
        return {"type": "llava", "name": kind, "annotations": at(f"{kind}/a.json"), "images": at(f"{kind}/{images}")}

    return [
        llava("folder", "images"),
        llava("zip", "images.zip"),
        {"type": "questions", "annotations": at("questions/q.jsonl"), "images": at("questions/images")}
        | {"image_suffix": ".png"},
        {"type": "captions", "table": at("captions/t.tsv"), "images": at("captions/images")},
        {"type": "webdataset", "shards": at("tar/s-{000..002}.tar"), "caption": "txt"},
        {"type": "parquet", "files": at("parquet/train-*.parquet"), "conversation": "conversations"},
    ]


def config(at) -> DataConfig:
    settings = {"tokenizer": {"train_vocab_size": 300}, "max_tokens": 128, "partition_records": 10, "shard_rows": 8}
    return DataConfig(train=sources(at), **settings)


@pytest.fixture(scope="module")
def corpus(s3, tmp_path_factory):
    """The corpus on a local disk and in the store."""
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root)
    s3.upload(root, "corpus")
    return root


@pytest.fixture(scope="module")
def local(corpus, two_cpus, tmp_path_factory) -> Manifest:
    """The data set from and on the local disk."""
    out = str(tmp_path_factory.mktemp("set"))
    return prepare(config(lambda name: str(corpus / name)), out, TOKENS_PER_IMAGE, SEED)


def test_every_source_gives_the_same_from_both(corpus, s3):
    for here, there in zip(
        config(lambda name: str(corpus / name)).train, config(lambda name: s3.uri(f"corpus/{name}")).train, strict=True
    ):
        near, far = open_source(here), open_source(there)
        records = list(far.records())
        assert records == list(near.records()), here.type
        assert len(records) == COUNT, here.type
        assert [record.problem for record in records] == [None] * COUNT, here.type
        assert [far.read_image(r.images[0]) for r in records] == [near.read_image(r.images[0]) for r in records]
        assert far.fingerprint() == open_source(there).fingerprint()


def test_from_the_store_into_the_store(s3, local):
    out = s3.uri("sets/whole")
    manifest = prepare(config(lambda name: s3.uri(f"corpus/{name}")), out, TOKENS_PER_IMAGE, SEED)
    assert manifest.digest == local.digest
    assert manifest.splits["train"].samples == 6 * COUNT
    assert verify(out) == []
    listed = {"manifest.json", "quarantine.arrow", *(shard.path for shard in manifest.shards)}
    left = {name.removeprefix("sets/whole/") for name in s3.names("sets/whole")}
    assert {name for name in left if not name.startswith("tokenizer/")} == listed
    rows = PackedDataset(out)
    assert sum(len(rows[i].sample_ids) for i in range(len(rows))) == 6 * COUNT
    assert prepare(config(lambda name: s3.uri(f"corpus/{name}")), out, TOKENS_PER_IMAGE, SEED) == manifest


def test_a_killed_run_goes_on_and_shows_nothing_before_its_end(s3, local):
    class Killed(Exception):
        """Stands for the end of the driver."""

    def kill(event):
        if event.phase == "pack" and event.done:
            raise Killed

    out, events = s3.uri("sets/killed"), []
    recipe = config(lambda name: s3.uri(f"corpus/{name}"))
    with pytest.raises(Killed):
        prepare(recipe, out, TOKENS_PER_IMAGE, SEED, kill)
    with pytest.raises(FileNotFoundError, match="not finished"):
        PackedDataset(out)
    assert prepare(recipe, out, TOKENS_PER_IMAGE, SEED, events.append).digest == local.digest
    last = {event.phase: event for event in events}
    assert last["tokenize"].skipped == 6 * COUNT
    assert last["pack"].skipped > 0


def test_a_flipped_byte_in_the_store_is_found(s3, local):
    out = s3.uri("sets/flipped")
    manifest = prepare(config(lambda name: s3.uri(f"corpus/{name}")), out, TOKENS_PER_IMAGE, SEED)
    shard = storage.join(out, manifest.shards[0].path)
    data = bytearray(storage.read_bytes(shard))
    data[len(data) // 2] ^= 1
    storage.write_atomic(shard, bytes(data))
    assert [problem.split(" has ")[0] for problem in verify(out)] == [manifest.shards[0].path]


def test_a_tar_is_fetched_once(s3, tmp_path):
    size, chance = 0, random.Random(0)
    for shard in range(4):
        members = []
        for i in range(50):
            image = encoded(i) + chance.randbytes(200_000)  # what follows an image's end is not looked at
            members += [(f"{i:02}.png", image), (f"{i:02}.txt", f"A caption {i} of {shard}.")]
        size += write_tar(tmp_path / f"tar/w-{shard}.tar", members).stat().st_size
    s3.upload(tmp_path / "tar", "once")
    tokenizer = str(tmp_path / "tokenizer")
    save(load_or_train(TokenizerConfig(train_vocab_size=300), ["A caption 1 of 2."]), tokenizer)
    with counted(s3) as (server, traffic):
        shards = {"type": "webdataset", "shards": server.uri("once/w-{0..3}.tar"), "caption": "txt"}
        settings = {"tokenizer": {"name": tokenizer}, "max_tokens": 128, "shard_rows": 8, "deduplicate": False}
        manifest = prepare(DataConfig(train=[shards], **settings), str(tmp_path / "set"), TOKENS_PER_IMAGE, SEED)
    assert manifest.splits["train"].samples == 200
    # Besides, the driver tries the tokenizer on the first hundred records, and one task looks at the first of all.
    assert traffic.bytes < 1.05 * size + 100 * 200_000 + 2 * _BLOCK


def test_what_is_not_in_the_store_is_named(s3):
    for changes, message in (
        ({"type": "webdataset", "shards": s3.uri("corpus/tar/s-{000..009}.tar"), "caption": "txt"}, r"s-003\.tar"),
        ({"type": "parquet", "files": s3.uri("corpus/none/*.parquet"), "caption": "c"}, r"none/\*\.parquet"),
        ({"type": "llava", "annotations": s3.uri("corpus/none.json"), "images": s3.uri("corpus")}, r"none\.json"),
    ):
        changes = {name: value.replace("s3://", "s3://key:password@") for name, value in changes.items()}
        missing = DataConfig(train=[changes], tokenizer={"train_vocab_size": 300}, max_tokens=128).train[0]
        with pytest.raises(FileNotFoundError, match=message) as error:
            list(open_source(missing).records())
        assert "password" not in str(error.value)
