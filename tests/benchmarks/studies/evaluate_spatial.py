"""Which part answers spatial questions? Connectors and backbones taken apart, all of the same trainable size.

    nice -n 19 python -m tests.benchmarks.studies.evaluate_spatial --out FOLDER [--steps 2000] [--seeds 2]

Images and questions are those of tests/helpers/spatial_images.py. A frozen encoder's features (EfficientNet-lite0, as
in the quickstart) are computed once. Every connector is then trained with every backbone, Mamba-2 or a Transformer of
transformers, on the same rows in the same order. The backbones have the same number of parameters, and the
connectors' hidden width is chosen so that all pairs have: a difference is then of the kind of the part, not of its
size. The defaults are settings in which the MLP learns with either backbone, fixed before other connectors ran with
them.

Printed: accuracy by distance with 95% intervals (images are the unit), of each seed, and blind (images shuffled);
then the paired interval of what a part does beside each other part, and on average over them. FOLDER keeps every
finished run, so a killed series goes on, and the table, also as JSON.
"""

import argparse
import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from pipelines.identity import digest
from pipelines.storage import write_atomic
from tests.benchmarks.studies.evaluate_spatial_run import (
    CONNECTORS,
    MAMBA,
    TRANSFORMER,
    Pair,
    Result,
    Series,
    load_rows,
    matching_width,
    read,
    run,
    save_rows,
)
from tests.helpers.spatial_images import DISTANCES
from workflows.evaluate.statistics import bootstrap, ratios

OVERALL = "overall"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--connectors", nargs="+", default=CONNECTORS)
    parser.add_argument("--backbones", nargs="+", default=[MAMBA, TRANSFORMER], choices=[MAMBA, TRANSFORMER])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--size", type=int, default=400_000, help="trainable parameters of each pair, about")
    parser.add_argument("--train", type=int, default=9_600, help="images")
    parser.add_argument("--test", type=int, default=1_200, help="images")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16, help="images, each with all lessons")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--runs-at-once", type=int, default=2, help="processes, each with one thread")
    a = parser.parse_args()
    series = prepare_series(a)
    pairs = [Pair(c, b, seed) for seed in range(a.seeds) for c in a.connectors for b in a.backbones]
    run_all(series, [pair for pair in pairs if not series.result(pair).exists()], a.runs_at_once)
    distances = load_rows(series.folder / "test.safetensors").distances
    found = results({pair: read(series, pair) for pair in pairs}, distances)
    text = table(found)
    print(text)
    write_atomic(a.out / "spatial.json", json.dumps(found, indent=2))
    write_atomic(a.out / "spatial.txt", text + "\n")


def prepare_series(a: argparse.Namespace) -> Series:
    """The folder of runs with these settings, with the encoded images in it."""
    shared = {name: getattr(a, name) for name in ("width", "layers", "steps", "batch", "rate")}
    folder = a.out / digest(shared, a.size, a.train, a.test)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", a.train, 1), ("test", a.test, 2)):
        if not (folder / f"{split}.safetensors").exists():
            print(f"encoding {count:,} images of {split}", flush=True)
            save_rows(count, seed, folder / f"{split}.safetensors")
    channels = load_rows(folder / "test.safetensors").features.shape[-1]
    hidden = {name: matching_width(channels, name, a.width, a.layers, a.size) for name in a.connectors}
    return Series(folder, hidden, **shared)


def run_all(series: Series, pairs: list[Pair], at_once: int) -> None:
    """Do the runs, some at once. After an error those under way are finished and kept, and no more are begun."""
    start = time.perf_counter()
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
        try:
            futures = {pool.submit(run, series, pair): pair for pair in pairs}
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                pair, result = futures[future], read(series, futures[future])
                print(
                    f"{time.perf_counter() - start:6.0f} s  {done}/{len(pairs)}  {pair.connector:<18}"
                    f"{pair.backbone:<12} seed {pair.seed}: {result.parameters:,} parameters, loss {result.loss:.3f}, "
                    f"{result.right.mean():.1%} right, {result.seconds:.0f} s",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def results(found: dict[Pair, Result], distances: np.ndarray) -> dict:
    """Scores of every pair by distance, and the effects of connectors and of backbones, all with intervals."""
    pairs = list(dict.fromkeys((pair.connector, pair.backbone) for pair in found))
    runs = {pair: [found[one] for one in found if (one.connector, one.backbone) == pair] for pair in pairs}
    mean = {pair: np.mean([result.right for result in runs[pair]], axis=0) for pair in pairs}
    cells = [
        {
            "connector": pair[0],
            "backbone": pair[1],
            "parameters": runs[pair][0].parameters,
            "seeds": [float(result.right.mean()) for result in runs[pair]],
            "blind": float(np.mean([result.blind for result in runs[pair]])),
            "scores": _intervals(mean[pair], distances, (0.0, 1.0)),
        }
        for pair in pairs
    ]
    return {"cells": cells, "effects": _effects(runs, distances)}


def _effects(runs: dict[tuple[str, str], list[Result]], distances: np.ndarray) -> list[dict]:
    """What it changes to put a connector in the first one's place beside each backbone and on average, or a backbone
    beside each connector."""
    effects = []
    for place, part in enumerate(("connector", "backbone")):
        (first, *names), others = (list(dict.fromkeys(pair[i] for pair in runs)) for i in (place, 1 - place))
        groups = [[other] for other in others] + ([others] if len(others) > 1 else [])
        for name, beside in itertools.product(names, groups):
            changes = _right(runs, place, name, beside) - _right(runs, place, first, beside)
            scores = _intervals(changes.mean(0), distances, (-1.0, 1.0))
            about = {"part": part, "from": first, "to": name, "beside": beside}
            effects.append(about | {"seeds": changes.mean(1).tolist(), "scores": scores})
    return effects


def _right(runs: dict[tuple[str, str], list[Result]], place: int, name: str, beside: list[str]) -> np.ndarray:
    """(seeds, n) how often the part at this place of a pair is right, averaged over the parts beside it."""
    pairs = [(name, other) if place == 0 else (other, name) for other in beside]
    return np.mean([[result.right for result in runs[pair]] for pair in pairs], axis=0)


def table(found: dict) -> str:
    """The results for a person."""
    names = [OVERALL, *DISTANCES]
    heads = "".join(f"{name:>22}" for name in names)
    lines = ["", f"{'connector':<18}{'backbone':<13}{'size':>9}{'blind':>8}{heads}  seeds"]
    for cell in found["cells"]:
        pair = f"{cell['connector']:<18}{cell['backbone']:<13}{cell['parameters']:>9,}{cell['blind']:>8.1%}"
        shown = "".join(_shown(cell["scores"][name], "") for name in names)
        lines.append(f"{pair}{shown}  " + " ".join(f"{100 * value:.1f}" for value in cell["seeds"]))
    lines += ["", f"{'effect in points':<48}{heads}  seeds"]
    for effect in found["effects"]:
        beside = effect["beside"][0] if len(effect["beside"]) == 1 else "average"
        shown = "".join(_shown(effect["scores"][name], "+") for name in names)
        seeds = " ".join(f"{100 * value:+.1f}" for value in effect["seeds"])
        lines.append(f"{effect['from']} -> {effect['to']}, {beside}".ljust(48) + f"{shown}  {seeds}")
    lines += ["intervals: 95%, over test images; they do not hold the spread between seeds, so look at those too"]
    return "\n".join([*lines, "* the interval leaves out zero"])


def _intervals(values: np.ndarray, distances: np.ndarray, bounds: tuple[float, float]) -> dict[str, dict]:
    names = [OVERALL, *DISTANCES]
    asked = np.stack([np.ones(len(values)) if n == OVERALL else (distances == n) * 1.0 for n in names], axis=1)
    statistic = ratios(values[:, None] * asked, asked, np.arange(len(values)))
    counted = [int(n) for n in asked.sum(0)]
    found = bootstrap(statistic, len(values), counted=counted, bounds=[bounds] * len(names))
    return {name: asdict(interval) for name, interval in zip(names, found, strict=True)}


def _shown(interval: dict, sign: str) -> str:
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    mark = "*" if sign and (low > 0 or high < 0) else ""
    return f"{f'{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f}){mark}':>22}"


if __name__ == "__main__":
    main()
