"""Pass 1: records to token ids, labels and encoded images, one file per partition.

Each partition is one Ray task that lists, checks and tokenizes its records one at a time, so a task's memory holds one
record's images. A record that cannot be used goes to the outcomes table with a reason and its neighbours go on. A
partition whose outcomes file carries the right digest is not done again, which is what makes a killed run cheap to
repeat.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL.Image import Image
from pydantic import TypeAdapter

from mlmamba import __version__
from mlmamba.conversation import ML_MAMBA, EncodedConversation, encode, encode_whole
from mlmamba.image_layout import ImageLayout, TokensPerImage
from mlmamba.images import LIMITS, WIDEST, ImageLimits, image_size
from pipelines import storage
from pipelines.execution import run_tasks
from pipelines.held_out import on_side
from pipelines.looks import all_fields, fields, keys
from pipelines.records import Partition, outcomes_file, tokens_file
from pipelines.schema import LOOKS, OUTCOMES, TOKENS, WORK_VERSION, digest, one_row
from pipelines.source_config import SourceConfig
from pipelines.sources import Problem, Record, Source, open_source
from pipelines.tokenizer import TOKENIZER_FILE, WorkerTokenizer
from pipelines.validate import check_record, read_images

_DIGEST_KEY, _LOSSES_KEY = b"mlmamba.digest", b"mlmamba.losses"
_LONGEST_DETAIL = 500
_READS_AHEAD = 8  # outcome files; from a store, reading is mostly waiting


@dataclass(frozen=True)
class TokenizeSettings:
    """What tokenizing depends on besides the records."""

    tokenizer: str
    """URI of the folder with the tokenizer."""
    tokenizer_digest: str
    eos_token: str
    max_tokens: int
    tokens_per_image: TokensPerImage
    too_long: str
    """As in DataConfig."""
    images: ImageLimits = LIMITS
    """Which images are accepted."""
    whole_text: bool = False
    """Whether a conversation is tokenized as one text (pipelines/tokenizer_check.py)."""
    special_tokens: Sequence[str] = ()
    """The tokenizer's, which must not stand in a message."""
    chat: str = ML_MAMBA.name
    """Name of the chat format (mlmamba/conversation.py)."""
    looks: bool = False
    """Whether the outcomes get what each image looks like: its key, and of a validation image all keys (looks.py)."""

    def __post_init__(self):
        if isinstance(self.images, dict):  # as it comes out of JSON
            formats = tuple(self.images["formats"])
            object.__setattr__(self, "images", ImageLimits(**self.images | {"formats": formats}))

    def digest(self) -> str:
        """Changes when the same records would give other tokens. The place of the tokenizer does not matter."""
        parts = [
            __version__,
            WORK_VERSION,
            self.tokenizer_digest,
            self.eos_token,
            self.max_tokens,
            self.tokens_per_image,
        ]
        parts += [self.too_long, self.whole_text, *([] if self.images == LIMITS else [self.images])]
        parts += [*(["looks"] if self.looks else []), *([] if self.chat == ML_MAMBA.name else [self.chat])]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def tokenize(
    partitions: Iterable[Partition], sources: dict[str, list[SourceConfig]], settings: TokenizeSettings, work: str
) -> Iterator[dict]:
    """Tokenize every partition that is not done, on Ray.

    Args:
        partitions: of all splits.
        sources: source configs by split.
        settings: see `TokenizeSettings`.
        work: folder (path or URI) of the partitions' files.

    Yields:
        Statistics of a partition as it completes: `name`, `split`, `source`, `records`, `cut` (samples that lost
        turns), `quarantined` (counts by reason), `losses` (bytes lost, bytes there should be, and what happened) and
        `skipped` (it was done before).
    """
    configs = {
        split: {config.label: config.absolute().model_dump_json() for config in configs}
        for split, configs in sources.items()
    }
    plain = asdict(settings)
    tasks = (
        {
            "partition": partition.to_json(),
            "work": work,
            "source": configs[partition.split][partition.source],
            "settings": plain,
            "wanted": partition.split != "train",
        }
        for partition in partitions
    )
    yield from run_tasks(tokenize_partition, tasks, "Tokenize")


def tokenize_partition(task: dict) -> dict:
    """Do one partition, unless it is done, and return its statistics. Runs inside a Ray task."""
    partition = Partition.from_json(task["partition"])
    outcomes = _finished(task, partition)
    skipped = outcomes is not None
    if outcomes is None:
        outcomes = _tokenize_partition(task, partition)
    reasons = Counter(reason for reason in outcomes["reason"].to_pylist() if reason)
    return {
        "name": partition.name,
        "split": partition.split,
        "source": partition.source,
        "records": outcomes.num_rows,
        "cut": pc.sum(pc.greater(outcomes["cut_turns"], 0), min_count=0).as_py(),
        "quarantined": dict(sorted(reasons.items())),
        "losses": json.loads((outcomes.schema.metadata or {}).get(_LOSSES_KEY, b"[]")),
        "skipped": skipped,
    }


def partition_digest(uri: str) -> str:
    """The digest of the partition that an outcomes file is of."""
    return storage.open_arrow(uri).schema.metadata[_DIGEST_KEY].decode()


def iter_outcomes(names: Iterable[str], work: str, columns: list[str] | None = None) -> Iterator[tuple[str, pa.Table]]:
    """The outcomes of finished partitions, by their names, in order, a few files ahead of what is asked for."""

    def read(name: str) -> pa.Table:
        return storage.open_arrow(outcomes_file(work, name), columns).read_all()

    with ThreadPoolExecutor(_READS_AHEAD) as pool:
        waiting = iter(names)
        running = [(name, pool.submit(read, name)) for name in islice(waiting, _READS_AHEAD)]
        while running:
            name, table = running.pop(0)
            yield name, table.result()
            running += [(name, pool.submit(read, name)) for name in islice(waiting, 1)]


def encode_record(
    record: Record,
    source: Source,
    tokenizer,
    settings: TokenizeSettings,
    seen: Callable[[Image], None] | None = None,
) -> tuple[EncodedConversation, list[bytes], int] | Problem:
    """Turn a record into a sample: its encoding, its encoded images, how many turns it lost; or say what is wrong.

    The sample ends with the last answer that fits into `max_tokens`; a question after the last answer is dropped
    (it has no loss). Images that only dropped turns show are dropped with them. `seen` is called with every image.
    """
    problem = check_record(record, settings.eos_token, settings.special_tokens)
    if problem:
        return problem
    tokens, layout = encode_whole if settings.whole_text else encode, ImageLayout.of(settings.tokens_per_image)
    images = None
    if layout.fixed is None:  # their sizes decide how many tokens they take
        images, problem = read_images(record, source, settings.images, seen)
        if problem:
            return problem
        each = [layout.count(height, width) for width, height in (image_size(image, WIDEST) for image in images)]
    encoded = tokens(tokenizer, record.turns, layout.fixed if images is None else each)
    length = encoded.turn_ends[-1]
    if length > settings.max_tokens:
        fitting = [end for end in encoded.turn_ends if end <= settings.max_tokens]
        if settings.too_long == "quarantine" or not fitting:
            what = "the conversation" if fitting else "the first turn with its answer"
            size = length if fitting else encoded.turn_ends[0]
            return Problem("too_long", f"{what} has {size} tokens, a row has {settings.max_tokens}")
        length = fitting[-1]
    positions = [position for position in encoded.image_positions if position < length]
    if images is None:
        images, problem = read_images(record, source, settings.images, seen)
        if problem:
            return problem
    encoded = EncodedConversation(
        encoded.input_ids[:length],
        encoded.labels[:length],
        positions,
        [end for end in encoded.turn_ends if end <= length],
    )
    return encoded, images[: len(positions)], len(record.turns) - 2 * len(encoded.turn_ends)


def _finished(task: dict, partition: Partition) -> pa.Table | None:
    """The outcomes of a partition that is done with the same digest.

    The digest does not cover what is in images that have files of their own. So those that were bad are looked at once
    more, and if somebody has repaired one, the partition is not done.
    """
    outcomes, tokens = outcomes_file(task["work"], partition.name), tokens_file(task["work"], partition.name)
    if not (storage.exists(outcomes) and storage.exists(tokens)):
        return None
    reader = storage.open_arrow(outcomes)
    if (reader.schema.metadata or {}).get(_DIGEST_KEY) != partition.digest.encode():
        return None
    outcomes, source = reader.read_all(), worker_source(task["source"])
    reasons = zip(outcomes["record_id"].to_pylist(), outcomes["reason"].to_pylist(), strict=True)
    bad = {name for name, reason in reasons if (reason or "").startswith("image_")}
    if bad and not source.images_inside:
        limits = TokenizeSettings(**task["settings"]).images
        for record in partition.read(source):
            if record.id in bad and not record.problem and read_images(record, source, limits)[1] is None:
                return None
    return outcomes


def _tokenize_partition(task: dict, partition: Partition) -> pa.Table:
    settings, source = TokenizeSettings(**task["settings"]), worker_source(task["source"])
    tokenizer = _worker_tokenizer(settings.tokenizer, settings.tokenizer_digest, settings.eos_token, settings.chat)
    metadata = {_DIGEST_KEY: partition.digest}
    tokens_schema = TOKENS.with_metadata(metadata)
    outcomes_schema = OUTCOMES.append(LOOKS) if settings.looks else OUTCOMES
    shrink = all_fields if task.get("wanted") else fields
    rows, losses = [], []
    with (
        storage.atomic_file(tokens_file(task["work"], partition.name)) as path,
        pa.output_stream(path, buffer_size=storage.WRITE_BUFFER) as sink,
        pa.ipc.new_file(sink, tokens_schema) as writer,
    ):
        for record, own in on_side(partition.read(source), source, source.held_out, partition.split):
            if record.problem and record.problem.lost and record.repeat == 1:
                losses.append([record.problem.lost, record.problem.of, record.problem.detail])
            shown: list[bytes] = []
            seen = (lambda image, shown=shown: shown.append(shrink(image))) if settings.looks else None
            try:
                sample = encode_record(record, own, tokenizer, settings, seen)
            except Exception as error:  # whatever is wrong with this record, the others of its partition must go on
                sample = Problem("malformed", f"{type(error).__name__}: {error}")
            row = {"record_id": record.id, "source": record.source, "length": 0, "images": 0, "cut_turns": 0}
            if isinstance(sample, Problem):
                rows.append(row | {"reason": sample.reason, "detail": sample.detail[:_LONGEST_DETAIL]})
                continue
            encoded, images, cut_turns = sample
            sizes = {"length": len(encoded.input_ids), "images": len(images), "cut_turns": cut_turns}
            ids = np.array(encoded.input_ids, dtype=np.int32)
            rows.append(row | sizes | _digests(record, ids, images) | {"looks": shown[: len(images)]})
            columns = {
                "record_id": record.id,
                "source": record.source,
                "input_ids": ids,
                "labels": np.array(encoded.labels, dtype=np.int32),
                "image_positions": encoded.image_positions,
                "images": images,
            }
            writer.write_batch(one_row(tokens_schema, columns))
    if settings.looks:
        made = iter(keys([one for row in rows for one in row.get("looks", ())]))
        rows = [row | {"looks": list(islice(made, len(row.get("looks", ()))))} for row in rows]
    metadata[_LOSSES_KEY] = json.dumps(losses)
    outcomes = pa.Table.from_pylist(rows, schema=outcomes_schema.with_metadata(metadata))
    storage.write_table(outcomes_file(task["work"], partition.name), outcomes)
    return outcomes


def _digests(record: Record, ids: np.ndarray, images: list[bytes]) -> dict:
    """What tells whether another record is the same, and whether its images occur elsewhere."""
    digests = [digest(image) for image in images]
    tokens = ids.astype("<i4", copy=False).tobytes()
    return {
        "id": digest(record.source.encode(), record.id.encode()),
        "content": digest(str(record.repeat).encode(), tokens, *digests),
        "digests": digests,
    }


# Kept for the life of a worker process, which does many partitions. The digest is in the key because a folder's
# tokenizer may be replaced between two runs that share workers.
@lru_cache(maxsize=4)
def _worker_tokenizer(uri: str, digest: str, eos_token: str, chat: str) -> WorkerTokenizer:
    return WorkerTokenizer(storage.read_bytes(storage.join(uri, TOKENIZER_FILE)), eos_token, chat)


@lru_cache(maxsize=64)
def worker_source(config_json: str) -> Source:
    """The reader of a source config, kept open."""
    return open_source(TypeAdapter(SourceConfig).validate_json(config_json))
