"""A finished data set made without Ray in a second: real tokenizer, real encoding, every kind of sample."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from mlmamba.conversation import IGNORE_INDEX, EncodedConversation, Turn, encode
from pipelines import storage
from pipelines.config import TokenizerConfig
from pipelines.manifest import Manifest, ShardInfo, split_info
from pipelines.quarantine import QUARANTINE_FILE
from pipelines.schema import PACKED, QUARANTINE, one_row
from pipelines.tokenizer import load_or_train, save
from tests.helpers.images import encoded

MAX_TOKENS, TOKENS_PER_IMAGE, PER_ROW, PER_SHARD = 400, 4, 3, 2
SET_ASIDE = [
    ("train", "bad-0", "captions", "image_missing", "no file 0.png"),
    ("train", "bad-1", "captions", "image_missing", "no file 1.png"),
    ("train", "bad-2", "talk", "empty_turn", "turn 1 (assistant) is empty"),
]


def turns_of(i: int) -> list[Turn]:
    """Conversation i: two questions; by i modulo 3, its first one shows no, one or two images."""
    return [
        Turn("user", f"what is number {i}?", images=i % 3),
        Turn("assistant", f"it is {'very ' * (i % 7)}small"),
        Turn("user", "\u043f\u043e\u0447\u0435\u043c\u0443?"),  # not all text is Latin
        Turn("assistant", "line one\nline two"),
    ]


def image_of(i: int) -> bytes:
    """The encoded image that sample i shows, of one colour."""
    return encoded(i, size=(20, 10), blocks=(1, 1))


def write_packed_set(out: Path, splits: dict[str, int], tokenizer=None, turns=turns_of) -> Manifest:
    """Write a data set with so many samples by split, alternately of the sources "talk" and "captions"."""
    if tokenizer is None:
        tokenizer = load_or_train(TokenizerConfig(train_vocab_size=300), ["what is it? very small. line one two"] * 3)
    digest = save(tokenizer, str(out / "tokenizer"))
    infos = {}
    for split, samples in splits.items():
        tokens = [(i, encode(tokenizer, turns(i), TOKENS_PER_IMAGE)) for i in range(samples)]
        rows = [_row(split, tokens[start : start + PER_ROW]) for start in range(0, samples, PER_ROW)]
        shards = [
            _shard(out, f"shards/{split}-{start // PER_SHARD:05d}.arrow", rows[start : start + PER_SHARD])
            for start in range(0, len(rows), PER_SHARD)
        ]
        bad: dict[str, Counter] = {}
        for owner, _, source, reason, _ in SET_ASIDE:
            if owner == split:
                bad.setdefault(source, Counter())[reason] += 1
        reasons = sum(bad.values(), Counter())
        infos[split] = split_info(
            shards, MAX_TOKENS, samples + reasons.total(), dict(reasons), 0, quarantined_by_source=bad
        )
    table = pa.Table.from_pylist([dict(zip(QUARANTINE.names, row, strict=True)) for row in SET_ASIDE], QUARANTINE)
    storage.write_table(str(out / QUARANTINE_FILE), table)
    manifest = Manifest(
        digest="",
        tokenizer_digest=digest,
        recipe_digest="recipe",
        sources={},
        max_tokens=MAX_TOKENS,
        tokens_per_image=TOKENS_PER_IMAGE,
        splits=infos,
    )
    manifest.digest = manifest.content_digest()
    manifest.save(str(out))
    return manifest


def _row(split: str, samples: list[tuple[int, EncodedConversation]]) -> dict:
    starts = np.cumsum([0, *(len(tokens.input_ids) for _, tokens in samples)])
    return {
        "sample_ids": [f"{split}-{i}" for i, _ in samples],
        "input_ids": np.concatenate([tokens.input_ids for _, tokens in samples]).astype(np.int32),
        "labels": np.concatenate([tokens.labels for _, tokens in samples]).astype(np.int32),
        "seq_idx": np.repeat(np.arange(len(samples), dtype=np.int32), np.diff(starts)),
        "images": [image_of(i) for i, tokens in samples for _ in tokens.image_positions],
        "image_positions": [
            int(start) + place
            for start, (_, tokens) in zip(starts, samples, strict=False)
            for place in tokens.image_positions
        ],
        "source": ["captions" if i % 2 else "talk" for i, _ in samples],
    }


def _shard(out: Path, path: str, rows: list[dict]) -> ShardInfo:
    storage.write_table(str(out / path), pa.Table.from_batches([one_row(PACKED, row) for row in rows]))
    size, sha256 = storage.checksum(str(out / path))
    return ShardInfo(
        path=path,
        rows=len(rows),
        samples=sum(len(row["sample_ids"]) for row in rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        loss_tokens=sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows),
        images=sum(len(row["images"]) for row in rows),
        bytes=size,
        sha256=sha256,
        samples_by_source=dict(sorted(Counter(source for row in rows for source in row["source"]).items())),
    )
