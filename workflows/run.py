"""The whole workflow: prepare, train each stage, evaluate, register, promote. The story of the project in one file.

Every step leaves a finished mark (manifest.json, stage.json, scores.json, the version's tag) only when it is whole, and
is skipped when its mark is there. So a workflow killed anywhere and started again goes on from where it was.
"""

import errno
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlmamba.image_layout import TokensPerImage
from pipelines import storage as files
from pipelines.config import DataConfig, data_identity
from pipelines.identity import digest
from pipelines.manifest import MANIFEST_FILE, Manifest
from workflows.console import Console
from workflows.errors import WorkflowError
from workflows.recipe.schema import DataRecipe, Recipe
from workflows.rerun import find_finished_run, leave_mark, prepared, tell_data, tell_promotion, trained
from workflows.runtime import connect_ray, stop_on_sigterm
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout, adopt_earlier, data_folder, earlier_data_folder, layout_of
from workflows.storage.lock import lock
from workflows.tracking.journal import FILES as JOURNAL_FILES
from workflows.tracking.journal import mirrored, short_reason
from workflows.train.job import finished, stage_digest

# Ray, torch and MLflow take seconds to import, so the steps that need them do it: a run with nothing to do has none.
if TYPE_CHECKING:
    from workflows.evaluate.run import Evaluated
    from workflows.tracking.tracker import Tracker
    from workflows.train.trainer import Crew


def run_workflow(recipe: Recipe, storage: Folder, console: Console) -> dict:
    """Run or continue a recipe. Returns the summary that is also written to summary.json in the run folder.

    Raises:
        UsageError, WorkflowError: with a message for the person who started it.
    """
    tokens = tokens_of_an_image(recipe)
    layout = layout_of(recipe, storage, tokens)
    with holding(recipe, layout, console):
        if done := find_finished_run(recipe, layout, tokens):
            done.tell(recipe, layout, console)
            return done.summary
        with session(recipe, layout, tokens, console, evaluates=True) as (tracker, crew):
            manifests = prepare_data(recipe, layout, console)
            data_digest = digest_of(manifests)
            tracker.log_data(manifests, layout)
            model_folder = train_stages(recipe, layout, manifests, console, tracker, crew)
            model = model_folder.fetch()
            evaluated = evaluate_model(recipe, layout, model, console, tracker, crew)
            crew.dismiss()
            promotion = publish(recipe, layout, tracker, model, data_digest, evaluated, console)
            summary = {
                "recipe": recipe.name,
                "run_id": tracker.run_id,
                "data": {"folders": sorted({folder.shown for folder in layout.data.values()}), "digest": data_digest},
                "model": {"folder": model_folder.shown, **promotion},
                "evaluation": evaluated.result,
                "samples": (layout.evaluation / "samples.png").shown,
                "example": evaluated.shown,
                "storage": storage.shown,
            }
            layout.run.write("summary.json", json.dumps(summary, indent=2))
            leave_mark(recipe, layout, summary)
    return summary


def train_only(recipe: Recipe, storage: Folder, console: Console, stage: str | None) -> dict:
    """Prepare and train, all stages or one. Returns the model's folder and the run's id.

    Raises:
        UsageError, WorkflowError: as `run_workflow`.
    """
    tokens = tokens_of_an_image(recipe)
    layout = layout_of(recipe, storage, tokens)
    with (
        holding(recipe, layout, console),
        session(recipe, layout, tokens, console) as (tracker, crew),
    ):
        manifests = prepare_data(recipe, layout, console)
        tracker.log_data(manifests, layout)
        model = train_stages(recipe, layout, manifests, console, tracker, crew, stage)
    return {"model": model.shown, "run_id": tracker.run_id}


@contextmanager
def holding(recipe: Recipe, layout: Layout, console: Console) -> Iterator[None]:
    """Hold the recipe's lock, and tell of what fails in the block as a person wants to hear it.

    Raises:
        WorkflowError: another process works on this recipe, the storage is full, or it or MLflow does not answer.
    """
    try:
        stop_on_sigterm()
        with lock((layout.run / "lock.json").uri, f"recipe {recipe.name}", console.note):
            yield
    except OSError as error:
        raise explained(error, layout.storage) from error
    except Exception as error:
        if "mlflow" in sys.modules and isinstance(error, sys.modules["mlflow"].MlflowException):
            raise WorkflowError(f"{short_reason(error)}. Run the same command again, it goes on from here") from error
        raise


@contextmanager
def session(
    recipe: Recipe, layout: Layout, tokens: int, console: Console, evaluates: bool = False
) -> Iterator[tuple["Tracker", "Crew"]]:
    """Set up what a workflow needs, and keep its MLflow run open and its workers there while the block runs.

    Ray is started when there is something to prepare or to train, and is left alone otherwise.

    Args:
        tokens: that one image takes.
        evaluates: the block will score the model too.

    Raises:
        UsageError, WorkflowError: the recipe does not fit the cluster, or the storage is full; before the block where
            it can be known there.
    """
    console.line("loading the libraries ...")
    from workflows.preflight import check_evaluation, check_nodes, check_room, check_weights, check_workers
    from workflows.tracking.tracker import Tracker, check_registry
    from workflows.train.initial import built, image_tokens
    from workflows.train.trainer import Crew

    storage = layout.storage
    image_tokens(recipe.model)
    check_registry(storage)
    if not built(layout.initial):
        check_weights(recipe.model)
    manifests = prepared(recipe, layout, tokens)
    if storage.remote or manifests is None or not trained(recipe, layout, manifests):
        connect_ray(say=console.note)
        check_workers(recipe)
        check_nodes(storage)
        if evaluates and storage.remote:
            check_evaluation(recipe.evaluate)
        check_room(recipe, layout, console.note)
    layout.run.local.mkdir(parents=True, exist_ok=True)
    with mirrored(layout.run, JOURNAL_FILES, console.note), Crew(recipe.train, layout) as crew:
        tracker = Tracker(storage.local, recipe, layout.run.name, layout.run.local, console.note)
        with _run_status(tracker):
            yield tracker, crew


def tokens_of_an_image(recipe: Recipe) -> TokensPerImage:
    """Tokens that one image takes, for the names of folders; `session` checks that the encoders give them."""
    if stated := recipe.model.stated_tokens:
        return stated
    from workflows.train.initial import image_tokens

    return image_tokens(recipe.model)


@contextmanager
def _run_status(tracker: "Tracker") -> Iterator[None]:
    """Set the MLflow run's status from how the block exits."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def explained(error: OSError, storage: Folder) -> Exception:
    """The error itself, or a message for a person when the storage is full or an object store fails."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkflowError(
            f"the storage {storage} is full ({error.strerror}: {error.filename or 'while writing'}): make room and run "
            "the same command again, it goes on from what is whole"
        )
    if storage.remote:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return WorkflowError(
            f"the storage {storage} failed: {reason}. Run the same command again, it goes on from what is whole"
        )
    return error


def prepare_data(recipe: Recipe, layout: Layout, console: Console) -> dict[str, Manifest]:
    """Shards and manifest of every stage's data. Returns the manifests by stage."""
    made: dict[Folder, Manifest] = {}
    tokens = tokens_of_an_image(recipe)
    for stage in recipe.train.stages:
        folder = layout.data[stage.name]
        if folder not in made:
            earlier = earlier_data_folder(layout.storage, recipe.data_of(stage), recipe.name, tokens, recipe.seed)
            made[folder] = _prepare_one(recipe.data_of(stage), folder, earlier, tokens, recipe.seed, console)
    return {stage.name: made[layout.data[stage.name]] for stage in recipe.train.stages}


def prepare_sets(recipe: Recipe | DataRecipe, storage: Folder, console: Console) -> dict[Folder, Manifest]:
    """Make every data set of a recipe, or the one of a data recipe. Returns the manifests by folder."""
    if isinstance(recipe, DataRecipe):
        named = (storage, recipe.data, recipe.name, recipe.tokens_per_image, recipe.seed)
        folder, earlier = data_folder(*named), earlier_data_folder(*named)
        return {folder: _prepare_one(recipe.data, folder, earlier, recipe.tokens_per_image, recipe.seed, console)}
    from workflows.train.initial import image_tokens

    layout = layout_of(recipe, storage, image_tokens(recipe.model))
    manifests = prepare_data(recipe, layout, console)
    return {layout.data[stage]: manifest for stage, manifest in manifests.items()}


def data_configs(recipe: Recipe | DataRecipe, storage: Folder) -> dict[Folder, DataConfig]:
    """What each of a recipe's data sets is made from, by folder, as `prepare_sets` names them."""
    if isinstance(recipe, DataRecipe):
        named = (storage, recipe.data, recipe.name, recipe.tokens_per_image, recipe.seed)
        return {data_folder(*named): recipe.data}
    layout = layout_of(recipe, storage, tokens_of_an_image(recipe))
    return {layout.data[stage.name]: recipe.data_of(stage) for stage in recipe.train.stages}


def _prepare_one(
    data: DataConfig, folder: Folder, earlier: Folder, tokens_per_image: TokensPerImage, seed: int, console: Console
) -> Manifest:
    from pipelines.prepare import PrepareError, prepare
    from workflows.preflight import check_images

    with console.step(f"prepare {folder.name}"):
        phases = []

        def watch(progress) -> None:
            phases.append(progress.phase)
            console.preparation(progress)

        try:
            held = folder.beside(f".{folder.name}.lock").uri
            with lock(held, f"preparation of {folder.name}", console.note, wait=True):
                if not (folder / MANIFEST_FILE).exists():
                    adopt_earlier(earlier, folder, data_identity(data, tokens_per_image, seed), console.note)
                if not (folder / MANIFEST_FILE).exists():
                    check_images(data)
                manifest = prepare(data, folder.uri, tokens_per_image, seed, watch)
                for name in files.list_names((folder / "tokenizer").uri):  # what the driver reads; workers read shards
                    folder.fetch_file(f"tokenizer/{name}")
                folder.fetch_file(MANIFEST_FILE)
        except (PrepareError, ValueError, OSError, ModuleNotFoundError) as error:
            raise WorkflowError(f"preparation: {error}") from error
        if phases == ["finished"]:
            console.note("done before, skipped")
        tell_data(manifest, console)
    return manifest


def digest_of(manifests: dict[str, Manifest]) -> str:
    """One digest for all the data of a workflow: the data set's own where there is but one."""
    digests = sorted({manifest.digest for manifest in manifests.values()})
    return digests[0] if len(digests) == 1 else digest(digests)


def train_stages(
    recipe: Recipe,
    layout: Layout,
    manifests: dict[str, Manifest],
    console: Console,
    tracker: "Tracker",
    crew: "Crew",
    only: str | None = None,
) -> Folder:
    """Train all stages, or the one called `only`. Returns the folder of the last trained model.

    Raises:
        WorkflowError: a stage cannot be trained on its data, or `only` needs an earlier stage that is not finished.
    """
    from workflows.train.stage import total_steps
    from workflows.train.trainer import run_stage

    build_untrained(recipe, layout, manifests)
    digests = {name: manifest.training_digest for name, manifest in manifests.items()}
    offset, model = 0, layout.initial
    for index, stage in enumerate(recipe.train.stages):
        done = finished(layout.stage(stage.name), stage_digest(recipe, index, digests))
        wanted = only in (None, stage.name)
        if not done and not wanted:
            if index < [s.name for s in recipe.train.stages].index(only):
                raise WorkflowError(
                    f"stage {only} starts from stage {stage.name}, which is not trained yet: train it first"
                )
            break
        if wanted or done:
            model = layout.stage(stage.name)
        if wanted:
            with console.step(f"train {stage.name}"):
                if done:
                    console.note("done before, skipped")
                else:
                    run_stage(recipe, stage, layout, digests, _watch(console, tracker, stage.name, offset), crew)
        offset += total_steps(stage, manifests[stage.name].splits["train"].rows)
    return model


def build_untrained(recipe: Recipe, layout: Layout, manifests: dict[str, Manifest]) -> None:
    """The model that the first stage starts from, unless it is there. Raises WorkflowError when a stage cannot be
    trained on its data."""
    from workflows.preflight import check_stages
    from workflows.train.initial import build_initial, built

    check_stages(recipe, manifests)
    if not built(layout.initial):
        with layout.initial.writing() as folder:
            shutil.rmtree(folder, ignore_errors=True)  # a copy that did not reach the object store
            build_initial(recipe, layout.data[recipe.train.stages[0].name].local, folder)


def _watch(console: Console, tracker: "Tracker", stage: str, offset: int):
    """Callback that shows an event and logs its numbers; steps count on over the stages."""
    state = {"workers": 0.0, "restarts": 0.0}

    def on_event(event: dict) -> None:
        console.training(event)
        kind = event["event"]
        if kind == "metrics":
            numbers = state | {k: v for k, v in event.items() if isinstance(v, float)}
            tracker.log_metrics({f"train/{k}": v for k, v in numbers.items()}, offset + event["step"])
        elif kind == "failure":
            state["restarts"] += 1
        elif kind == "start":
            state["workers"] = float(event["workers"])
            tracker.set_tag(f"mlmamba.stage.{stage}", event["text"])
            if made_by := event["resharded_from"]:
                console.note(f"the checkpoint of {made_by} workers is resharded for this number of them")
        elif kind == "chosen":
            tracker.log_params({f"chosen.{stage}.{name}": value for name, value in event["values"].items()})
        elif kind == "damaged":
            console.note(event["text"])
        elif kind == "validation":
            measured = {f"validation/{name}": event[name] for name in ("loss", "score")}
            tracker.log_metrics(measured, offset + event["step"])
            console.note(f"step {event['step']}: validation loss {event['loss']:.3f}, score {event['score']:.1%}")
        elif kind == "best":
            tracker.set_tag(f"mlmamba.best.{stage}", event["text"])
            console.note(event["text"])
        elif kind == "samples":
            tracker.log_samples(stage, offset + event["step"], event["rows"])
            said = "  ".join(f"{row['prediction']!r} (right: {row['answer']!r})" for row in event["rows"])
            console.note(f"step {event['step']} says: {said}"[:200])

    return on_event


def evaluate_model(
    recipe: Recipe, layout: Layout, model: Path, console: Console, tracker: "Tracker", crew: "Crew"
) -> "Evaluated":
    """Scores on the test sources and the benchmarks, beside the baselines; reports, and the sheet of samples."""
    from workflows.evaluate.run import evaluate_recipe
    from workflows.preflight import tasks_where_files_meet

    with console.step("evaluate"), layout.evaluation.editing() as out, tasks_where_files_meet(layout.storage):
        return evaluate_recipe(recipe, out, model, console, tracker, crew)


def publish(
    recipe: Recipe,
    layout: Layout,
    tracker: "Tracker",
    model: Path,
    data_digest: str,
    evaluated: "Evaluated",
    console: Console,
) -> dict:
    """Register the model, and move the alias to it if the gate holds and it was not rolled back before."""
    from workflows.registry import promote, register, rolled_back

    name, alias = recipe.register_as.name, recipe.register_as.alias
    with console.step("register"):
        scores, example = evaluated.result["scores"], evaluated.example
        version = register(tracker, recipe, layout, model, data_digest, scores, example)
        undone = rolled_back(tracker.client, name, version, alias)
        if undone:  # by a person; running the recipe again must not undo that
            failures, holds = [f"{undone.who} rolled it back; `mlmamba models promote {name}/{version}` decides"], False
        else:
            done = promote(tracker.client, name, version, alias, reason=f"mlmamba run {recipe.name}")
            failures, holds = done.gate_failures, done.holds
        promotion = {"name": name, "version": version, "alias": alias, "promoted": holds, "gate_failures": failures}
        if holds and done.moved:
            was = f" (was {done.previous})" if done.previous else ""
            console.note(f"{name} version {version} is now {alias}{was}")
        else:
            tell_promotion(promotion, console)
    return promotion
