"""The ablation's statistics and table (tests/benchmarks/studies/ablation.py): means over seeds, and paired differences.

A difference is taken between runs of the same seed, which share the language model's first weights and the order of
rows, and averaged within the seed over what a claim does not ask about. Its interval is Student's over the seeds: with
three, 4.3 standard errors to each side.
"""

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from scipy.stats import t as student

from tests.benchmarks.studies.ablation_settings import CONNECTORS, MATCHED

KINDS = ("overall", "yes/no", "colour", "shape")
LEVEL = 0.95
Cell = tuple[str, bool]
"""Connector and whether it has its own stage."""


@dataclass(frozen=True)
class Paired:
    """A mean difference over seeds and its interval; the ends are NaN for a single seed."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Claim:
    """A question to the runs: the mean, over the pairs, of the first cell's score minus the second's."""

    label: str
    pairs: tuple[tuple[Cell, Cell], ...]


def paired(differences: list[float]) -> Paired:
    """Mean of differences, one per seed, with Student's interval.

    Raises:
        ValueError: there are none.
    """
    if not differences:
        raise ValueError("a mean needs at least one difference")
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Paired(mean, math.nan, math.nan, n)
    half = student.ppf((1 + LEVEL) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Paired(mean, mean - half, mean + half, n)


def claims() -> dict[str, list[Claim]]:
    """What is asked, by heading: the claim itself first, then its parts."""
    both = (True, False)

    def against(label: str, plus: list[str], minus: list[str]) -> Claim:
        return Claim(label, tuple(((p, on), (m, on)) for p, m in zip(plus, minus, strict=True) for on in both))

    basic, advanced = ([f"{name}/{scan}" for scan in ("bsm", "csm")] for name in ("msc_basic", "msc_advanced"))
    stage = {c: ((c, True), (c, False)) for c in CONNECTORS}
    return {
        "connector stage on - off": [
            Claim("all connectors", tuple(stage.values())),
            *(Claim(connector, (pair,)) for connector, pair in stage.items()),
        ],
        "msc - mlp of msc_advanced's size": [
            against("msc_advanced", advanced, [MATCHED] * 2),
            *(against(one, [one], [MATCHED]) for one in advanced),
            against("msc_basic (smaller than the mlp)", basic, [MATCHED] * 2),
        ],
        "csm - bsm": [
            against("both msc", [basic[1], advanced[1]], [basic[0], advanced[0]]),
            against("msc_basic", basic[1:], basic[:1]),
            against("msc_advanced", advanced[1:], advanced[:1]),
        ],
        "advanced - basic": [
            against("both scans", advanced, basic),
            against("bsm", advanced[:1], basic[:1]),
            against("csm", advanced[1:], basic[1:]),
        ],
    }


def differences(lines: list[dict], claim: Claim, kind: str) -> list[float]:
    """A claim's difference for each seed of which all runs are there."""
    found = {(line["connector"], line["stage"], line["seed"]): line["scores"][kind] for line in lines}
    cells = {cell for pair in claim.pairs for cell in pair}
    seeds = sorted({seed for *_, seed in found})
    return [
        statistics.fmean(found[(*plus, seed)] - found[(*minus, seed)] for plus, minus in claim.pairs)
        for seed in seeds
        if all((*cell, seed) in found for cell in cells)
    ]


def table(lines: list[dict]) -> str:
    """Scores and differences for a person, as two tables in Markdown."""
    return "\n".join(
        [
            *_grid(["connector", "parameters", "stage", "runs", *KINDS], _scores(lines)),
            "",
            "Exact match in percent: mean (standard deviation) over the runs' seeds.",
            "",
            *_grid(["paired difference in points", *KINDS, "overall says"], _differences(lines)),
            "",
            f"{LEVEL:.0%} paired t intervals over seeds, one at a time; * where it leaves out 0.",
        ]
    )


def _scores(lines: list[dict]) -> Iterator[list[str]]:
    for connector in CONNECTORS:
        for on in (True, False):
            runs = [line for line in lines if (line["connector"], line["stage"]) == (connector, on)]
            if runs:
                about = [connector, f"{runs[0]['parameters']:,}", "on" if on else "off", str(len(runs))]
                yield [*about, *(_spread([100 * run["scores"][kind] for run in runs]) for kind in KINDS)]
    for name in ("blind", "majority"):
        for line in lines:
            if name in line:
                about = [f"{name} of {line['connector']}", "", "on" if line["stage"] else "off", "1"]
                yield [*about, *(f"{100 * line[name][kind]:.1f}" for kind in KINDS)]


def _differences(lines: list[dict]) -> Iterator[list[str]]:
    for heading, asked in claims().items():
        yield [f"**{heading}**", *[""] * (len(KINDS) + 1)]
        for claim in asked:
            found = {kind: paired(d) for kind in KINDS if (d := differences(lines, claim, kind))}
            if found:
                yield [claim.label, *map(_interval, found.values()), verdict(found["overall"])]


def _grid(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A Markdown table whose columns are as wide as their widest cell."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = ["| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]]


def verdict(found: Paired) -> str:
    """What a difference says, in words."""
    if math.isnan(found.low):
        return "one seed says nothing"
    if found.clear:
        return "better" if found.mean > 0 else "worse"
    return f"no difference that {_WORDS.get(found.seeds, found.seeds)} seeds can show"


_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} ({statistics.stdev(values) if len(values) > 1 else math.nan:.1f})"


def _interval(found: Paired) -> str:
    mean, low, high = (100 * value for value in (found.mean, found.low, found.high))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}){'*' if found.clear else ''}"
