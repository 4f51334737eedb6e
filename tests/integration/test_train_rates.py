"""`mlmamba train RECIPE --find-lr` on real workers: it suggests, draws, logs the plot, and leaves nothing trained."""

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.helpers.toy_workflow import mlmamba, recipe, write_corpus, write_recipe

pytestmark = pytest.mark.slow


def test_a_ramp_suggests_a_rate_and_trains_nothing(tmp_path):
    write_corpus(tmp_path)
    content = recipe(tmp_path)
    # The connector alone, before a language model that knows nothing, learns at no rate; so the stage that trains both.
    alone = content | {"train": content["train"] | {"stages": content["train"]["stages"][-1:]}}
    file = write_recipe(tmp_path / "tiny.yaml", alone)
    storage = tmp_path / "storage"
    done = mlmamba("train", file, "--find-lr", "--storage", storage, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 1e-5 < found["suggestion"] < 0.1
    assert len(found["rates"]) == len(found["losses"]) >= 60
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    assert [one.path.startswith("find-lr/") for one in client.list_artifacts(found["run_id"], "find-lr")] == [True]
    assert not list(storage.rglob("stage.json"))
    names = [stage["name"] for stage in content["train"]["stages"]]
    whole = write_recipe(tmp_path / "whole.yaml", content)
    later = mlmamba("train", whole, "--find-lr", "--stage", names[-1], "--storage", storage)
    assert later.returncode != 0
    assert f"stage {names[-1]} starts from stage {names[-2]}, which is not trained yet" in later.stderr
