"""What is in a finished data set: counts, lengths, sources and what was set aside, as plain data.

The counts are the manifest's. Lengths, pictures per sample and samples per row are counted from rows: all of them or,
in a split of more than `ROWS`, that many drawn at random. Of those only the small columns are read, no pictures.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipelines import storage
from pipelines.manifest import Manifest, SplitInfo
from pipelines.quarantine import QUARANTINE_FILE
from pipelines.schema import values
from pipelines.shuffle import permutation

ROWS = 5000  # rows that the histograms of a split are made from
BINS = 12
_THREADS = 16  # shards read at a time; in an object store reading is waiting
_COLUMNS = ["sample_ids", "seq_idx", "image_positions"]


def inspect_data(uri: str) -> dict:
    """Everything that inspect_text.report shows, as plain data for JSON.

    Args:
        uri: folder of the data set, path or URI.

    Returns:
        The manifest without its lists of shards; of each split also `shards` and `bytes` (their number and size),
        `rows_counted`, and of `tokens_per_sample`, `images_per_sample` and `samples_per_row` the least, median, mean,
        most and `bins`; and `quarantine`, one entry per split, source and reason with an example.

    Raises:
        FileNotFoundError, ValueError: as `Manifest.load`.
    """
    manifest = Manifest.load(uri)
    content = manifest.model_dump(exclude={"splits"})
    content["uri"] = storage.shown(uri)
    content["splits"] = {name: _split(uri, split) for name, split in manifest.splits.items()}
    content["quarantine"] = _quarantine(uri)
    return content


def _split(uri: str, split: SplitInfo) -> dict:
    tokens, images, per_row = _count(uri, split)
    content = split.model_dump(exclude={"shards"})
    content["shards"], content["bytes"] = len(split.shards), sum(shard.bytes for shard in split.shards)
    content["rows_counted"] = len(per_row)
    content["tokens_per_sample"] = _distribution(tokens)
    content["images_per_sample"] = _distribution(images)
    content["samples_per_row"] = _distribution(per_row)
    return content


def _distribution(numbers: np.ndarray) -> dict:
    return {
        "least": int(numbers.min()),
        "median": int(np.median(numbers)),
        "mean": round(float(numbers.mean()), 1),
        "most": int(numbers.max()),
        "bins": histogram(numbers),
    }


def _count(uri: str, split: SplitInfo) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and pictures of each sample, samples of each row, int64, of the rows that are counted."""
    rows = np.arange(split.rows) if split.rows <= ROWS else np.sort(permutation(split.rows, "inspect")[:ROWS])
    ends = np.cumsum([shard.rows for shard in split.shards])
    shards = np.searchsorted(ends, rows, side="right")
    places = rows - np.concatenate([[0], ends])[shards]

    def read(shard: int) -> list[tuple[np.ndarray, np.ndarray]]:
        reader = storage.open_arrow(storage.join(uri, split.shards[shard].path), _COLUMNS)
        return [_count_row(reader.get_batch(int(place))) for place in places[shards == shard]]

    with ThreadPoolExecutor(_THREADS) as threads:
        counted = [row for rows in threads.map(read, np.unique(shards).tolist()) for row in rows]
    lengths, images = (np.concatenate(parts) for parts in zip(*counted, strict=True))
    return lengths, images, np.array([len(lengths) for lengths, _ in counted])


def _count_row(batch) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and pictures of each sample of a row."""
    seq_idx, positions = (values(batch, name).to_numpy() for name in ("seq_idx", "image_positions"))
    samples = len(values(batch, "sample_ids"))
    return np.bincount(seq_idx, minlength=samples), np.bincount(seq_idx[positions], minlength=samples)


def _quarantine(uri: str) -> list[dict]:
    """The reasons for which records were set aside, most frequent first, each with its first record."""
    file = storage.join(uri, QUARANTINE_FILE)
    if not storage.exists(file):
        return []
    table = storage.open_arrow(file).read_all()
    counts, first = Counter(), {}
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            key = row["split"], row["source"], row["reason"]
            counts[key] += 1
            first.setdefault(key, {"id": row["record_id"], "detail": row["detail"]})
    return [
        {"split": split, "source": source, "reason": reason, "records": count, "example": first[split, source, reason]}
        for (split, source, reason), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def histogram(numbers: np.ndarray, bins: int = BINS) -> list[dict]:
    """Counts in at most `bins` + 1 bins whose edges are round numbers: `from` (included), `to` (included), `count`."""
    least, most = int(numbers.min()), int(numbers.max())
    width = _round_up(max((most - least + 1) / bins, 1))
    edges = np.arange(least // width * width, most + width, width)
    counts = np.bincount((numbers - edges[0]) // width, minlength=len(edges))
    return [
        {"from": int(edge), "to": int(edge + width - 1), "count": int(count)}
        for edge, count in zip(edges, counts, strict=True)
        if edge <= most
    ]


def _round_up(number: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, 100, ..."""
    power = 10 ** (len(str(int(number))) - 1)
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)
