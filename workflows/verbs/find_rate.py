"""`mlmamba train RECIPE --find-lr`: the recipe's data and first model, the ramp on its workers, and its plot."""

from workflows.console import Console
from workflows.errors import WorkflowError
from workflows.recipe.schema import Recipe
from workflows.run import build_untrained, holding, prepare_data, session, tokens_of_an_image
from workflows.storage.folder import Folder
from workflows.storage.layout import layout_of
from workflows.train.job import finished, stage_digest
from workflows.train.rates import Ramp, RateSearch


def find_rate(recipe: Recipe, storage: Folder, console: Console, name: str | None) -> dict:
    """Prepare, and try learning rates on one stage, by default the first. Returns what the ramp gave and suggests.

    Raises:
        UsageError, WorkflowError: as `run_workflow`; the stage before is not trained yet.
    """
    from workflows.train.trainer import stage_job  # Ray, which takes seconds to import

    tokens = tokens_of_an_image(recipe)
    layout = layout_of(recipe, storage, tokens)
    stages = {stage.name: stage for stage in recipe.train.stages}
    stage = stages[name or next(iter(stages))]
    with holding(recipe, layout, console), session(recipe, layout, tokens, console) as (tracker, crew):
        manifests = prepare_data(recipe, layout, console)
        build_untrained(recipe, layout, manifests)
        digests = {name: manifest.training_digest for name, manifest in manifests.items()}
        job = stage_job(recipe, stage, layout, digests, layout.checkpoints / f"find-lr-{stage.name}")
        before = list(stages)[: list(stages).index(stage.name)]
        if before and not finished(layout.stage(before[-1]), stage_digest(recipe, len(before) - 1, digests)):
            raise WorkflowError(f"stage {stage.name} starts from stage {before[-1]}, which is not trained yet")
        with console.step(f"find a learning rate for {stage.name}"):
            outcome = crew.run(RateSearch(job), f"stage {stage.name}", console.training)
            Folder(job.checkpoints).delete()
            if "stopped" in outcome:
                raise WorkflowError(outcome["stopped"])
            ramp = Ramp(outcome["rates"], outcome["losses"])
            text, plot = ramp.told(stage.name, stage.learning_rate), layout.run.local / f"find-lr-{stage.name}.png"
            ramp.draw(plot, stage.name)
            tracker.log_file(plot, "find-lr")
    return {**outcome, "suggestion": ramp.suggestion, "plot": str(plot), "run_id": tracker.run_id, "text": text}
