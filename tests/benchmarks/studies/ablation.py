"""Does the connector's own stage earn its place, and does the scan? Connectors and stages on one small data set.

    nice -n 19 python -m tests.benchmarks.studies.ablation --out FOLDER [--steps 830] [--runs-at-once 2]

The quickstart's data and model, shortened. Six connectors: the MLP, basic and advanced MSC with BSM and CSM scans, and
an MLP as large as the advanced MSC. Each with the connector stage and without; without it, its steps go to the full
stage, so that both take the same steps over the same rows. Each from three seeds. Printed: exact match on the test
split, and the paired differences that answer the questions.

Every finished run is a line in FOLDER/runs.jsonl, and only what is missing is run; a killed series goes on.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from pipelines.identity import digest
from pipelines.storage import write_atomic
from tests.benchmarks.studies.ablation_run import run
from tests.benchmarks.studies.ablation_settings import CONNECTORS, Series, Setting, connector_fields, parameters
from tests.benchmarks.studies.ablation_table import table
from workflows.recipe.load import load_recipe
from workflows.recipe.schema import Recipe
from workflows.storage.folder import Folder
from workflows.storage.layout import data_folder
from workflows.train.initial import image_tokens


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set, the runs and the table")
    parser.add_argument("--steps", type=int, default=830, help="optimizer steps of a run, both stages together")
    parser.add_argument("--connector-steps", type=int, default=20, help="those of the connector stage")
    parser.add_argument("--batch-rows", type=int, default=2, help="packed rows of a step; one pass has 831")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--connectors", nargs="+", default=[*CONNECTORS], choices=[*CONNECTORS])
    parser.add_argument("--runs-at-once", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of the runs that are done")
    a = parser.parse_args()
    if not 0 < a.connector_steps < a.steps:
        parser.error(f"--connector-steps {a.connector_steps} must lie between 0 and --steps {a.steps}")
    recipe = load_recipe(a.recipe)
    series = prepare_series(recipe, a)
    settings = [Setting(c, on, seed) for seed in range(a.seeds) for c in a.connectors for on in (True, False)]
    missing = [one for one in settings if one not in {setting_of(line) for line in read_lines(series)}]
    print(f"{len(settings) - len(missing)} of {len(settings)} runs are done", flush=True)
    if not a.table:
        run_all(series, missing, a.runs_at_once)
    text = table([line for line in read_lines(series) if setting_of(line) in settings])
    write_atomic(a.out / "ablation.md", text + "\n")
    print(text)


def run_all(series: Series, settings: list[Setting], at_once: int) -> None:
    """Do the runs, some at once. After an error those under way are finished and written, and no more are begun."""
    start = time.perf_counter()
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(run, series, one) for one in settings]):
                print(f"{time.perf_counter() - start:6.0f} s  {summary(done.result())}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def prepare_series(recipe: Recipe, a: argparse.Namespace) -> Series:
    """The data set, made if need be, and the plan that the runs' lines carry."""
    import ray

    from pipelines.prepare import prepare

    out, tokens = a.out.absolute(), image_tokens(recipe.model)
    folder = data_folder(Folder(out), recipe.data, recipe.name, tokens, recipe.seed).local
    if not (folder / "manifest.json").exists():
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    manifest = prepare(recipe.data, str(folder), tokens, recipe.seed)
    ray.shutdown()
    series = Series(a.recipe, folder, out / "runs.jsonl", "", a.steps, a.connector_steps, a.batch_rows)
    stages = [stage.model_dump(mode="json") for own in (True, False) for stage in series.stages(recipe, own)]
    connectors = {label: connector_fields(recipe, label) for label in CONNECTORS}
    for label, fields in connectors.items():
        print(f"{label:<20}{parameters(recipe, fields):>9,} parameters")
    return replace(series, plan=digest(manifest.digest, recipe.model, connectors, stages))


def read_lines(series: Series) -> list[dict]:
    """The lines of this series' finished runs."""
    if not series.lines.exists():
        return []
    lines = [json.loads(line) for line in series.lines.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["plan"] == series.plan]


def setting_of(line: dict) -> Setting:
    """The run that a line is of."""
    return Setting(line["connector"], line["stage"], line["seed"])


def summary(line: dict) -> str:
    """One finished run for a person."""
    shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in line["scores"].items())
    stage = "on " if line["stage"] else "off"
    seconds = line["seconds"]
    return (
        f"{line['connector']:<18}stage {stage} seed {line['seed']}: {shown}; loss {line['losses']['full']:.3f}; "
        f"{seconds['all']:.0f} s, {seconds['train']:.0f} of them training"
    )


if __name__ == "__main__":
    main()
