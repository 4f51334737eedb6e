"""Whether the storage has room for what a workflow will write, asked before it starts."""

import shutil
from collections.abc import Callable

from pipelines.manifest import MANIFEST_FILE
from workflows.build import image_tokens
from workflows.config import Recipe
from workflows.errors import WorkflowError
from workflows.layout import Layout
from workflows.plan.rows import count_rows
from workflows.plan.train import GIB, disk_of, meta_model
from workflows.storage import CACHE, is_remote, place


def check_room(recipe: Recipe, layout: Layout, note: Callable[[str], None]) -> None:
    """Raise WorkflowError when not even the models fit; tell when checkpoints and data may not.

    Only of a workflow that has not begun: of another, part of it is there. An object store has room, its copies on this
    machine's disk need some.
    """
    if layout.initial.exists():
        return
    remote = is_remote(place(layout.storage))
    free = shutil.disk_usage(layout.storage).free
    _, sizes, _ = meta_model(recipe, layout)
    tokens, data = image_tokens(recipe.model), {}
    for stage in recipe.train.stages:
        folder = layout.data[stage.name]
        data[folder] = count_rows(recipe.data_of(stage), folder, tokens, {}).bytes or 0
        data[folder] *= not (remote or (folder / MANIFEST_FILE).exists())  # else it takes no room here, or no more
    disk = disk_of(recipe.train, sizes, data)
    certain, likely = disk["models"] + disk["registered"], disk["total"]
    text = f"{layout.storage} has {free / GIB:.1f} GiB free"
    if free < certain:
        raise WorkflowError(
            f"{text}, the models of this recipe alone take {certain / GIB:.1f} GiB: make room, or choose another "
            f"{CACHE if remote else '--storage'} (`mlmamba train RECIPE --dry-run` lists what takes how much)"
        )
    if free < likely:
        note(f"{text}, this workflow may take {likely / GIB:.1f} GiB (`--dry-run` lists what)")
