"""A finished workflow that is run again: known from its marks, without Ray, torch or MLflow, whose imports take longer.

The last step of a workflow leaves `finished.json`: what was asked for, and what the answer depends on besides the data
and the stages, which have marks of their own. Whatever is not as it was then is left to the workflow itself.
"""

import json
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import data_identity
from pipelines.finished import find_finished
from pipelines.identity import digest
from pipelines.manifest import Manifest
from pipelines.sources import open_source
from workflows.console import Console
from workflows.recipe.schema import Recipe
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout
from workflows.train.job import finished, stage_digest

MARK = "finished.json"


@dataclass(frozen=True)
class Finished:
    """A workflow with nothing left to do."""

    manifests: dict[str, Manifest]
    summary: dict

    def tell(self, recipe: Recipe, layout: Layout, console: Console) -> None:
        """Show the steps, as the workflow itself would."""
        for folder, manifest in {layout.data[stage]: made for stage, made in self.manifests.items()}.items():
            with console.step(f"prepare {folder.name}"):
                console.note("done before, skipped")
                tell_data(manifest, console)
        for step in (*(f"train {stage.name}" for stage in recipe.train.stages), "evaluate"):
            with console.step(step):
                console.note("done before, skipped")
        with console.step("register"):
            tell_promotion(self.summary["model"], console)


def tell_data(manifest: Manifest, console: Console) -> None:
    """What a data set holds, in a few lines."""
    from pipelines.losses import told

    train = manifest.splits["train"]
    bad = sum(sum(split.quarantined.values()) for split in manifest.splits.values())
    cut = sum(split.cut for split in manifest.splits.values())
    console.note(
        f"{train.rows:,} training rows, {train.tokens:,} tokens, {train.fill:.1%} full; {bad} records set aside"
        + (f", {cut} cut short" if cut else "")
    )
    for split in manifest.splits.values():
        for name, share in split.lost.items():
            console.note(told(name, share))
    console.note(manifest.without_images())


def tell_promotion(model: dict, console: Console) -> None:
    """Whether a version holds its alias; `model` is the summary's."""
    called = f"{model['name']} version {model['version']}"
    if model["promoted"]:
        console.note(f"{called} is {model['alias']} already")
        return
    console.note(f"{called} is registered but not promoted:")
    for failure in model["gate_failures"]:
        console.note(f"  {failure}")


def prepared(recipe: Recipe, layout: Layout, tokens: int) -> dict[str, Manifest] | None:
    """The manifests by stage if every data set is there, of this recipe and of the sources as they are; else None.

    Args:
        tokens: that one image takes.
    """
    found = {}
    for stage in recipe.train.stages:
        config, folder = recipe.data_of(stage), layout.data[stage.name]
        try:
            manifest = find_finished(config, folder.uri, data_identity(config, tokens, recipe.seed))
        except (ValueError, OSError):  # the preparation says what is wrong
            return None
        if manifest is None:
            return None
        found[stage.name] = manifest
    return found


def trained(recipe: Recipe, layout: Layout, manifests: dict[str, Manifest]) -> bool:
    """Whether every stage's finished model is there."""
    digests = {name: manifest.training_digest for name, manifest in manifests.items()}
    return all(
        finished(layout.stage(stage.name), stage_digest(recipe, index, digests))
        for index, stage in enumerate(recipe.train.stages)
    )


def find_finished_run(recipe: Recipe, layout: Layout, tokens: int) -> Finished | None:
    """The finished workflow, if nothing of it would be done again; else None.

    Of a registry that is a server, and of published benchmarks, only the workflow itself can tell.
    """
    try:
        mark = json.loads(layout.run.read(MARK))
        if mark["state"] != state(recipe, layout, mark["summary"]):
            return None
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
    manifests = prepared(recipe, layout, tokens)
    if manifests is None or not trained(recipe, layout, manifests):
        return None
    return Finished(manifests, mark["summary"])


def leave_mark(recipe: Recipe, layout: Layout, summary: dict) -> None:
    """Write down that the workflow is finished; its last step."""
    found = state(recipe, layout, summary)
    if found is not None:
        layout.run.write(MARK, json.dumps({"state": found, "summary": summary}, indent=1))


def state(recipe: Recipe, layout: Layout, summary: dict) -> str | None:
    """Digest of all that decides whether a finished workflow's evaluation and registration still hold.

    The recipe to its last field, the test sources' records, the files of the model and of the evaluation, and what the
    registry says about the model's name. None where that cannot be told.
    """
    if layout.storage.remote or os.environ.get("MLFLOW_TRACKING_URI") or recipe.evaluate.benchmarks:
        return None
    registry = _registry(layout.storage, summary["run_id"], summary["model"]["name"])
    if registry is None:
        return None
    tests = [open_source(source).fingerprint() for source in recipe.data.test]
    files = [*_files(Path(summary["model"]["folder"])), *_files(layout.evaluation.local)]
    return digest(recipe.model_dump(mode="json"), tests, files, registry)


def _files(folder: Path) -> list:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    facts = [(file, file.stat()) for file in files]
    return [[str(file.relative_to(folder)), found.st_size, found.st_mtime_ns] for file, found in facts]


def _registry(storage: Folder, run_id: str, name: str) -> list | None:
    """What MLflow's database holds about a registered model and a run, as rows that are compared and not understood."""
    database = storage.local / "mlflow.db"
    if not database.exists():
        return None
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            asked = [("select lifecycle_stage from runs where run_uuid = ?", run_id)]
            for table in ("registered_model_aliases", "registered_model_tags", "model_version_tags"):
                asked.append((f"select * from {table} where name = ? order by 1, 2, 3", name))
            asked.append(("select name, version, current_stage from model_versions where name = ? order by 2", name))
            return [[list(map(str, row)) for row in connection.execute(text, (value,))] for text, value in asked]
    except sqlite3.Error:  # another schema, or locked
        return None
