"""What is in a data set: counts, lengths, sources and records set aside, as plain data and as text.

Of an unfinished one it is what was set aside so far. `inspect_data` takes the counts from the manifest. Lengths, images
per sample and samples per row it counts from rows: all of them or, in a split of more than `ROWS`, that many drawn at
random. It reads only the small columns, no images.
`report` turns the result into text for a person.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mlmamba.image_layout import ImageLayout
from pipelines import storage
from pipelines.manifest import MANIFEST_FILE, Manifest, SplitInfo
from pipelines.quarantine import QUARANTINE_FILE
from pipelines.schema import values
from pipelines.shuffle import permutation

ROWS = 5000  # rows that the histograms of a split are made from
BINS = 12  # of a histogram, at most; one more where the round edges ask for it
_BAR = 40  # characters of the longest bar
_THREADS = 16  # shards read at a time, many because reading from an object store is mostly waiting
_COLUMNS = ["sample_ids", "seq_idx", "image_positions"]


def inspect_data(uri: str) -> dict:
    """Count what a data set holds, as plain data for JSON; `report` shows it as text.

    Args:
        uri: folder of the data set, path or URI.

    Returns:
        The manifest without its lists of shards; of each split also `shards` and `bytes` (their number and size),
        `rows_counted`, and of `tokens_per_sample`, `images_per_sample` and `samples_per_row` the least, median, mean,
        most and `bins`; and `quarantine`, one entry per split, source and reason with an example. Of an unfinished data
        set `unfinished` (true), `uri` and `quarantine` alone.

    Raises:
        FileNotFoundError, ValueError: as `Manifest.load`.
    """
    if not storage.exists(storage.join(uri, MANIFEST_FILE)) and storage.exists(storage.join(uri, QUARANTINE_FILE)):
        return {"uri": storage.shown(uri), "unfinished": True, "quarantine": _quarantine(uri)}
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


def histogram(numbers: np.ndarray, bins: int = BINS) -> list[dict]:
    """Count in at most `bins` + 1 bins with round edges, each as `from` (included), `to` (included) and `count`."""
    least, most = int(numbers.min()), int(numbers.max())
    width = _round_up(max((most - least + 1) / bins, 1))
    edges = np.arange(least // width * width, most + width, width)
    counts = np.bincount((numbers - edges[0]) // width, minlength=len(edges))
    return [
        {"from": int(edge), "to": int(edge + width - 1), "count": int(count)}
        for edge, count in zip(edges, counts, strict=True)
        if edge <= most
    ]


def _count(uri: str, split: SplitInfo) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count tokens and images of each sample and samples of each row (int64 arrays) over the rows that are counted."""
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
    """Count tokens and images of each sample of a row."""
    seq_idx, positions = (values(batch, name).to_numpy() for name in ("seq_idx", "image_positions"))
    samples = len(values(batch, "sample_ids"))
    return np.bincount(seq_idx, minlength=samples), np.bincount(seq_idx[positions], minlength=samples)


def _quarantine(uri: str) -> list[dict]:
    """List the reasons for which records were set aside, most frequent first, each with its first record."""
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


def _round_up(number: float) -> int:
    """Round up to the next of 1, 2, 5, 10, 20, 50, 100, ..."""
    power = 10 ** (len(str(int(number))) - 1)
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)


def report(content: dict) -> str:
    """Format the result of `inspect_data` as text."""
    if content.get("unfinished"):
        lines = [content["uri"], "not finished: no manifest.json. What was set aside when the preparation stopped:"]
        return "\n".join([*lines, *_set_aside(content["quarantine"])])
    splits = content["splits"]
    lines = [
        content["uri"],
        f"digest {content['digest']}",
        f"made by {content['created_by']}",
        f"a row has up to {content['max_tokens']:,} tokens, an image takes "
        f"{ImageLayout.of(content['tokens_per_image'])}",
        "",
        *_numbers(splits),
    ]
    for name, split in splits.items():
        for title, table in split.items():
            if not title.startswith("quarantined") and isinstance(table, dict):
                drawn = f" (from {split['rows_counted']:,} of {split['rows']:,} rows)"
                part = drawn if "bins" in table and split["rows_counted"] < split["rows"] else ""
                lines += _table(f"{name}: {title.replace('_', ' ')}{part}", table)
    if content["excluded"]:
        lines += _bars("images of evaluation sets, which training records must not show", content["excluded"])
    lines += ["", "the images of a turn stand before its text, wherever the corpus had them"]
    lines += _set_aside(content["quarantine"])
    return "\n".join(lines)


def _numbers(splits: dict[str, dict]) -> list[str]:
    """Every plain number of the splits, one line each, a column per split."""
    names = {key: None for split in splits.values() for key, value in split.items() if isinstance(value, int | float)}
    rows = [["", *splits]]
    for name in names:
        if name != "rows_counted":
            rows.append([name.replace("_", " "), *(_number(name, split.get(name, 0)) for split in splits.values())])
    rows.append(["set aside", *(f"{sum(split['quarantined'].values()):,}" for split in splits.values())])
    return _aligned(rows)


def _table(title: str, table: dict) -> list[str]:
    """Counts by name, or a distribution."""
    if "bins" not in table:
        return _bars(title, table)
    numbers = ", ".join(f"{key} {table[key]:,}" for key in ("least", "median", "mean", "most"))
    bins = table["bins"]
    labels = [f"{b['from']:,}" if b["from"] == b["to"] else f"{b['from']:,} - {b['to']:,}" for b in bins]
    return _bars(f"{title}: {numbers}", {label: b["count"] for label, b in zip(labels, bins, strict=True)})


def _bars(title: str, counts: dict[str, int]) -> list[str]:
    """A title and a bar per count."""
    total, most = max(sum(counts.values()), 1), max([*counts.values(), 1])
    rows = [
        [label, f"{count:,}", f"{count / total:.1%}", "#" * round(_BAR * count / most)]
        for label, count in counts.items()
    ]
    return ["", title, *_aligned(rows, left=(3,))] if rows else []


def _set_aside(entries: list[dict]) -> list[str]:
    if not entries:
        return ["", "no records were set aside"]
    rows = [["records", "reason", "source", "split", "first record"]]
    for entry in entries:
        example = _short(f"{entry['example']['id']}: {entry['example']['detail']}")
        rows.append([f"{entry['records']:,}", entry["reason"], entry["source"], entry["split"], example])
    return ["", f"set aside (all of them in {QUARANTINE_FILE})", *_aligned(rows, left=(1, 2, 3, 4))]


def _aligned(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    """Format rows as lines with aligned columns: those in `left` to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines


def _number(key: str, value: float) -> str:
    if key == "fill":
        return f"{value:.2%}"
    return f"{value / 2**20:,.1f} MiB" if key == "bytes" else f"{value:,}"


def _short(text: str, length: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."
