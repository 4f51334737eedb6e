"""What pipelines/inspect.py found, aligned for a terminal."""

from pipelines.quarantine import QUARANTINE_FILE

_BAR = 40  # characters of the longest bar


def report(content: dict) -> str:
    """The result of `inspect_data` as text."""
    splits = content["splits"]
    lines = [
        content["uri"],
        f"digest {content['digest']}",
        f"made by {content['created_by']}",
        f"a row has up to {content['max_tokens']:,} tokens, a picture takes {content['tokens_per_image']:,}",
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
        lines += _bars("pictures of evaluation sets, which training records must not show", content["excluded"])
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
    """Lines whose columns stand under one another; those in `left` begin together, the others end together."""
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
