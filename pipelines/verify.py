"""Reading a finished data set again and comparing every file and every count with its manifest."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs
from tokenizers import Tokenizer

from mlmamba.conversation import IGNORE_INDEX, IMAGE_TOKEN
from mlmamba.images import WIDEST, ImageError, image_size
from pipelines import storage
from pipelines.config import DataConfig
from pipelines.finished import changed_sources, wrong_size
from pipelines.manifest import MANIFEST_FILE, TOKENIZER_PATH, Manifest, ShardInfo, SplitInfo
from pipelines.progress import Progress, ProgressMeter
from pipelines.quarantine import QUARANTINE_FILE
from pipelines.schema import values

_THREADS = 4  # hashing and reading release the interpreter lock
_SUMS = ("rows", "samples", "tokens", "loss_tokens", "images")


def verify(
    uri: str, on_progress: Callable[[Progress], None] = lambda progress: None, config: DataConfig | None = None
) -> list[str]:
    """Read every file of a data set again and compare it with the manifest.

    Args:
        uri: folder of the data set.
        on_progress: called with each shard that is done.
        config: what the set was made from; with it, sources that have changed since are problems as well.

    Returns:
        One sentence per problem; an empty list means that the data set is what the manifest says.

    Raises:
        FileNotFoundError, ValueError: as `Manifest.load`.
    """
    manifest = Manifest.load(uri)
    tokenizer, problems = _tokenizer(uri, manifest)
    image_id = tokenizer.token_to_id(IMAGE_TOKEN) if tokenizer else None
    meter = ProgressMeter("verify", "shards", on_progress, len(manifest.shards))
    with ThreadPoolExecutor(_THREADS) as threads:
        for found in threads.map(lambda shard: _shard(uri, shard, manifest, image_id), manifest.shards):
            problems += found
            meter.add(1)
    listed = {shard.path for shard in manifest.shards}
    there = (f"shards/{name}" for name in storage.list_names(storage.join(uri, "shards")) if name.endswith(".arrow"))
    problems += [f"{path} is not in the manifest" for path in there if path not in listed]
    for name, split in manifest.splits.items():
        problems += _totals(name, split, manifest.max_tokens)
    problems += _quarantine(uri, manifest)
    problems += changed_sources(config, manifest) if config else []
    if manifest.content_digest() != manifest.digest:
        problems.append(f"{MANIFEST_FILE} has digest {manifest.digest}, its shards give {manifest.content_digest()}")
    return problems


def _tokenizer(uri: str, manifest: Manifest) -> tuple[Tokenizer | None, list[str]]:
    try:
        _, sha256 = storage.checksum(storage.join(uri, TOKENIZER_PATH))
    except FileNotFoundError:
        return None, [f"{TOKENIZER_PATH} is missing"]
    if sha256 != manifest.tokenizer_digest:
        return None, [f"{TOKENIZER_PATH} has sha256 {sha256}, the manifest says {manifest.tokenizer_digest}"]
    return Tokenizer.from_buffer(storage.read_bytes(storage.join(uri, TOKENIZER_PATH))), []


def _shard(uri: str, shard: ShardInfo, manifest: Manifest, image_id: int | None) -> list[str]:
    """What is wrong with a shard's bytes or, where those are right, with what the manifest says of its content."""
    try:
        with _local(storage.join(uri, shard.path)) as file:
            return _compare(file, shard, manifest, image_id)
    except ImageError as error:
        return [f"{shard.path} holds an image that cannot be read: {error}"]
    except FileNotFoundError:
        return [f"{shard.path} is missing"]
    except OSError as error:
        return [f"{shard.path} cannot be read: {error}"]


@contextmanager
def _local(uri: str) -> Iterator[str]:
    """A local path to read the file at: its own, or that of a copy, since reading rows over a network is slow."""
    filesystem, path = storage.open_fs(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = f"{folder}/shard"
        with filesystem.open_input_stream(path, compression=None) as source, open(copy, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 22)
        yield copy


def _compare(file: str, shard: ShardInfo, manifest: Manifest, image_id: int | None) -> list[str]:
    size, sha256 = storage.checksum(file)
    if problem := wrong_size(shard, size):
        return [problem]
    if sha256 != shard.sha256:
        return [f"{shard.path} has other content: its sha256 is {sha256}, the manifest says {shard.sha256}"]
    facts, longest, image_tokens, expected = _recount(storage.open_arrow(file), image_id, manifest)
    said = {name: getattr(shard, name) for name in facts}
    problems = [
        f"{MANIFEST_FILE} says {name} = {said[name]} of {shard.path}, which has {facts[name]}"
        for name in facts
        if said[name] != facts[name]
    ]
    if longest > manifest.max_tokens:
        problems.append(
            f"{shard.path} has a row of {longest} tokens, the manifest says max_tokens {manifest.max_tokens}"
        )
    if image_id is not None and image_tokens != expected:
        problems.append(
            f"{shard.path} has {image_tokens} image tokens for {facts['images']} images, the manifest says "
            f"tokens_per_image {manifest.tokens_per_image}"
        )
    return problems


def _recount(
    reader: pa.ipc.RecordBatchFileReader, image_id: int | None, manifest: Manifest
) -> tuple[dict, int, int, int]:
    """The counts of ShardInfo from a shard's rows, its longest row, its number of image tokens and what that should
    be."""
    counts, sources, longest, image_tokens, expected = Counter(dict.fromkeys(_SUMS, 0)), Counter(), 0, 0, 0
    layout = manifest.layout
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        ids, labels = (values(batch, name).to_numpy() for name in ("input_ids", "labels"))
        counts["rows"] += batch.num_rows
        counts["samples"] += len(values(batch, "sample_ids"))
        counts["tokens"] += len(ids)
        counts["loss_tokens"] += int((labels != IGNORE_INDEX).sum())
        counts["images"] += len(values(batch, "image_positions"))
        sources.update(values(batch, "source").to_pylist())
        longest = max(longest, len(ids))
        image_tokens += 0 if image_id is None else int((ids == image_id).sum())
        if layout.fixed is None:
            sizes = (image_size(data, WIDEST) for data in values(batch, "images").to_pylist())
            expected += sum(layout.count(height, width) for width, height in sizes)
    expected = expected if layout.fixed is None else counts["images"] * layout.fixed
    return {**counts, "samples_by_source": dict(sorted(sources.items()))}, longest, image_tokens, expected


def _totals(name: str, split: SplitInfo, max_tokens: int) -> list[str]:
    """Whether a split's totals are the sums of what the manifest says of its shards and of its quarantine."""
    expected = {key: sum(getattr(shard, key) for shard in split.shards) for key in _SUMS}
    by_source = Counter()
    for shard in split.shards:
        by_source.update(shard.samples_by_source)
    expected["samples_by_source"] = dict(sorted(by_source.items()))
    expected["records"] = expected["samples"] + sum(split.quarantined.values())
    expected["fill"] = round(expected["tokens"] / max(expected["rows"] * max_tokens, 1), 6)
    return [
        f"{MANIFEST_FILE} says {key} = {getattr(split, key)} of the {name} split, its parts give {value}"
        for key, value in expected.items()
        if getattr(split, key) != value
    ]


def _quarantine(uri: str, manifest: Manifest) -> list[str]:
    """Whether the quarantine table holds as many records of each reason as the manifest says."""
    try:
        table = storage.open_arrow(storage.join(uri, QUARANTINE_FILE), ["split", "source", "reason"]).read_all()
        _, sha256 = storage.checksum(storage.join(uri, QUARANTINE_FILE))
    except FileNotFoundError:
        return [f"{QUARANTINE_FILE} is missing"]
    except (OSError, pa.ArrowInvalid) as error:
        return [f"{QUARANTINE_FILE} cannot be read: {error}"]
    problems = []
    if manifest.quarantine_sha256 not in (None, sha256):
        problems.append(
            f"{QUARANTINE_FILE} has other content: its sha256 is {sha256}, the manifest says "
            f"{manifest.quarantine_sha256}"
        )
    for name, split in manifest.splits.items():
        own = table.filter(pc.equal(table["split"], name))
        by_reason, by_source = Counter(), {}
        for row in own.group_by(["source", "reason"]).aggregate([([], "count_all")]).to_pylist():
            by_reason[row["reason"]] += row["count_all"]
            by_source.setdefault(row["source"], {})[row["reason"]] = row["count_all"]
        for said, counted in ((split.quarantined, dict(by_reason)), (split.quarantined_by_source, by_source)):
            if said != counted:
                problems.append(
                    f"{MANIFEST_FILE} says {said} were set aside of {name}, {QUARANTINE_FILE} has {counted}"
                )
    return problems
