"""Around the work of a workflow: its lock, Ray, the checks before anything starts, and its MLflow run to the end."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.exceptions import MlflowException

from workflows.build import built, image_tokens
from workflows.config import Recipe
from workflows.console import Console
from workflows.errors import WorkflowError
from workflows.journal import FILES as JOURNAL_FILES
from workflows.journal import short_reason
from workflows.layout import Layout, layout_of
from workflows.mirror import mirrored
from workflows.nodes import check_nodes, check_this_node
from workflows.plan.room import check_room
from workflows.runtime import connect_ray, stop_on_sigterm
from workflows.storage import address, is_remote, place
from workflows.store_lease import lease
from workflows.tracking import Tracker, check_registry
from workflows.train.trainer import check_cluster
from workflows.weights import check_weights


@contextmanager
def session(
    recipe: Recipe, storage: Path, console: Console, evaluates: bool = False
) -> Iterator[tuple[Layout, Tracker]]:
    """Everything that a workflow needs while it runs. The run's status is what becomes of the block.

    Args:
        evaluates: the block will score the model too.

    Raises:
        UsageError, WorkflowError: another process works on this recipe, the recipe does not fit the cluster, or the
            storage is full; before the block where it can be known there.
    """
    layout = layout_of(recipe, storage, image_tokens(recipe.model))
    check_registry(storage)
    try:
        if not built(layout.initial):
            check_weights(recipe.model)
        stop_on_sigterm()
        with lease(layout.run / "lock.json", f"recipe {recipe.name}", console.note):
            connect_ray()
            check_cluster(recipe)
            check_nodes(storage)
            if evaluates and is_remote(place(storage)):
                check_this_node(recipe.evaluate)
            check_room(recipe, layout, console.note)
            layout.run.mkdir(parents=True, exist_ok=True)
            with mirrored(layout.run, JOURNAL_FILES, console.note):
                tracker = Tracker(storage, recipe, layout.run.name, layout.run, console.note)
                with _status(tracker):
                    yield layout, tracker
    except OSError as error:
        raise clear(error, storage) from error
    except MlflowException as error:
        raise WorkflowError(f"{short_reason(error)}. Run the same command again, it goes on from here") from error


@contextmanager
def _status(tracker: Tracker) -> Iterator[None]:
    """What becomes of the block becomes the run's status."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def clear(error: OSError, storage: Path) -> Exception:
    """The error itself, or a message for a person when the storage is full or an object store fails."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkflowError(
            f"the storage {storage} is full ({error.strerror}: {error.filename or 'while writing'}): make room and run "
            "the same command again, it goes on from what is whole"
        )
    if is_remote(place(storage)):
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return WorkflowError(
            f"the storage {address(storage)} failed: {reason}. Run the same command again, it goes on from what is "
            "whole"
        )
    return error
