"""Which MLflow experiment the runs of a recipe stand in, asked of MLflow's own database."""

import pytest
from mlflow.tracking import MlflowClient

from tests.helpers.toy_workflow import recipe
from workflows.errors import WorkflowError
from workflows.recipe.schema import Recipe
from workflows.tracking.tracker import Tracker


def open_run(folder, **changes) -> tuple[Tracker, MlflowClient]:
    content = Recipe.model_validate(recipe(folder, **changes))
    (folder / content.name).mkdir(exist_ok=True)
    tracker = Tracker(folder, content, f"{content.name}-run", folder / content.name, print)
    return tracker, MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def test_tries_on_one_corpus_stand_in_one_experiment(tmp_path):
    runs = [open_run(tmp_path, name=name, experiment="street signs") for name in ("first", "second")]
    client = runs[0][1]
    ids = {client.get_run(tracker.run_id).info.experiment_id for tracker, _ in runs}
    assert ids == {client.get_experiment_by_name("street signs").experiment_id}
    alone, _ = open_run(tmp_path, name="third")
    assert client.get_run(alone.run_id).info.experiment_id == client.get_experiment_by_name("third").experiment_id


def test_a_deleted_experiment_is_named_with_what_to_do(tmp_path):
    _, client = open_run(tmp_path, name="first")
    number = client.get_experiment_by_name("first").experiment_id
    client.delete_experiment(number)
    with pytest.raises(WorkflowError, match=f"'first' was deleted; restore it .*--experiment-id {number}"):
        open_run(tmp_path, name="first")
    client.restore_experiment(number)
    open_run(tmp_path, name="first")


@pytest.mark.parametrize("name", ["", " a", "a\n", "x" * 251])
def test_a_name_that_mlflow_would_not_show_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="experiment"):
        Recipe.model_validate(recipe(tmp_path, experiment=name))
