"""Registering a model on a real MLflow: what a version carries, its lineage, and registering the same model again."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.packed_set import write_packed_set
from tests.helpers.swap_models import drawn_example, write_model
from tests.helpers.toy_workflow import recipe, write_corpus
from workflows.cli import main
from workflows.recipe.schema import Recipe
from workflows.registry import get_version, lineage, promote, register, resolve_model
from workflows.registry.register import Example
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout
from workflows.tracking.tracker import Tracker

GATE = {"least": {"overall": 0.5}, "margin": {"overall": 0.02}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Storage, recipe, layout, tracker and model folder, as a finished training leaves them."""
    torch.set_num_threads(1)
    storage = tmp_path_factory.mktemp("storage")
    write_corpus(storage / "corpus")
    content = recipe(storage / "corpus", evaluate={"gate": GATE})
    chosen = Recipe.model_validate(content)
    write_packed_set(storage / "data" / "tiny-1", {"train": 9})
    where = Folder(storage)
    data = {"connector": where / "data" / "tiny-1", "full": where / "data" / "tiny-1"}
    layout = Layout(where, data, where / "runs" / "tiny-1")
    tracker = Tracker(storage, chosen, "tiny-1", layout.run.local, print)
    tracker.client.set_tag(tracker.run_id, "mlmamba.stage.full", "stage full: trains connector (1), language_model (2)")
    model = write_model(layout.stage("full").local, 1)
    (model / "stage.json").write_text(json.dumps({"digest": "abc123"}))
    return storage, chosen, layout, tracker, model


@pytest.fixture(scope="module")
def version(made):
    _, chosen, layout, tracker, model = made
    return register(tracker, chosen, layout, model, "sha256:feed", {"overall": 0.7}, drawn_example("a circle"))


def test_a_version_carries_scores_gate_data_recipe_code_and_example(made, version):
    storage, _, _, tracker, model = made
    tags = get_version(tracker.client, f"tiny/{version}").tags
    assert json.loads(tags["mlmamba.scores"]) == {"overall": 0.7}
    assert json.loads(tags["mlmamba.gate"]) == {"most": {}, **GATE}
    assert (tags["mlmamba.data_digest"], tags["mlmamba.recipe"], tags["mlmamba.model"]) == (
        "sha256:feed",
        "tiny",
        "abc123",
    )
    assert tags["mlmamba.git"] == tracker.client.get_run(tracker.run_id).data.tags["mlmamba.git"]
    (file,) = (Path(tracker.client.download_artifacts(tracker.run_id, "recipe.yaml")),)
    assert Recipe.model_validate(yaml.safe_load(file.read_text())).evaluate.gate.least == GATE["least"]
    found = resolve_model(f"models:/tiny/{version}", storage)
    assert Example.load(found.example) == drawn_example("a circle")
    assert (found.folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_lineage_leads_from_the_alias_to_run_and_shards(made, version, capsys):
    storage, _, layout, tracker, _ = made
    promote(tracker.client, "tiny", version)
    found = lineage(tracker.client, "tiny@champion")
    (data,) = found["data"]
    manifest = json.loads((layout.data["full"].local / "manifest.json").read_text())
    assert (data["digest"], data["state"]) == (manifest["digest"], "there")
    assert (data["rows"], data["tokens"]) == (
        manifest["splits"]["train"]["rows"],
        manifest["splits"]["train"]["tokens"],
    )
    assert data["stages"] == ["connector", "full"]
    assert found["run"]["run_id"] == found["model"]["run_id"] == tracker.run_id
    assert found["model"]["aliases"] == ["champion"]
    assert main(["models", "lineage", "tiny@champion", "--storage", str(storage)]) == 0
    text = capsys.readouterr().out
    for part in (data["folder"], "still there, unchanged", tracker.run_id, "stage full: trains", "tiny/1 @champion"):
        assert part in text, part


def test_lineage_says_when_the_shards_have_changed_or_gone(made, version):
    *_, layout, tracker, _ = made
    file = layout.data["full"].local / "manifest.json"
    whole = file.read_text()
    try:
        content = json.loads(whole)
        file.write_text(json.dumps({**content, "digest": "other"}))
        assert lineage(tracker.client, f"tiny/{version}")["data"][0]["state"] == "changed"
        file.unlink()
        assert lineage(tracker.client, f"tiny/{version}")["data"][0]["state"] == "gone"
    finally:
        file.write_text(whole)


def test_the_same_model_is_registered_once_and_judged_anew(made, version):
    _, chosen, layout, tracker, model = made
    tracker.client.set_model_version_tag(
        "tiny", version, "mlmamba.scores", json.dumps({"overall": 0.7, "pope/overall": 0.6})
    )
    stricter = Recipe.model_validate(
        {**chosen.model_dump(mode="json"), "evaluate": {"gate": {"least": {"overall": 0.9}}}}
    )
    assert register(tracker, stricter, layout, model, "sha256:feed", {"overall": 0.75}) == version
    tags = get_version(tracker.client, f"tiny/{version}").tags
    assert json.loads(tags["mlmamba.scores"]) == {"overall": 0.75, "pope/overall": 0.6}
    assert promote(tracker.client, "tiny", version, "strict").gate_failures == [
        "overall is 0.75, at least 0.9 is wanted"
    ]
