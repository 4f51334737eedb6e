"""One toy stage on the real Ray Train, as the workflow runs it, with something done to its workers on the way."""

from collections.abc import Callable
from pathlib import Path

import psutil

from tests.helpers.toy_training import STAGE, Outcome, Toy
from workflows.recipe.schema import Recipe
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout
from workflows.train.trainer import run_stage


def toy_recipe(toy: Toy, stage: dict | None = None, **train) -> Recipe:
    """The toy's recipe with a single stage."""
    content = toy.recipe.model_dump(mode="json")
    content["train"] |= {"save_every": 100, "log_every": 1, **train, "stages": [STAGE | (stage or {})]}
    return Recipe.model_validate(content)


def run_toy_stage(
    toy: Toy, out: Path, recipe: Recipe, on_event: Callable[[dict], None] = lambda event: None
) -> Outcome:
    """Train the recipe's stage below `out`; Ray must be up. `on_event` sees every event as it comes."""
    (stage,) = recipe.train.stages
    (out / "initial").parent.mkdir(parents=True, exist_ok=True)
    if not (out / "initial").exists():
        (out / "initial").symlink_to(toy.initial)
    events: list[dict] = []

    def keep(event: dict) -> None:
        events.append(event)
        on_event(event)

    folder = run_stage(
        recipe, stage, Layout(Folder(out), {stage.name: Folder(toy.data)}, Folder(out)), {stage.name: "toy"}, keep
    )
    (out / "model").symlink_to(folder.local)
    return Outcome("", events, out)


def training_workers(driver: psutil.Process) -> list[psutil.Process]:
    """The processes of Ray Train's workers below a process that started Ray; without their controller."""
    found = []
    for child in driver.children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found
