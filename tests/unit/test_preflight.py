"""What is asked before a workflow starts: room in the storage, and whether the weights that it names are there."""

import errno
from pathlib import Path

import pytest

from tests.helpers.toy_workflow import recipe
from workflows import preflight as room
from workflows.errors import UsageError, WorkflowError
from workflows.preflight import check_weights
from workflows.recipe.schema import Recipe
from workflows.run import explained
from workflows.storage.folder import Folder
from workflows.storage.layout import layout_of


def test_models_that_the_storage_cannot_hold_are_refused_before_the_start(tmp_path, monkeypatch):
    loaded, notes = Recipe.model_validate(recipe(Path("/nowhere"))), []
    layout = layout_of(loaded, Folder(tmp_path), 4)
    sizes = {"free": 10**9}
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: type("Usage", (), sizes))
    room.check_room(loaded, layout, notes.append)
    assert notes == []
    sizes["free"] = 2_500_000  # the models are three of half a megabyte and the registered one
    room.check_room(loaded, layout, notes.append)
    assert "this workflow may take" in notes[0]
    sizes["free"] = 1_000_000
    with pytest.raises(WorkflowError, match=r"has 0.0 GiB free, the models of this recipe alone take"):
        room.check_room(loaded, layout, notes.append)
    layout.initial.local.mkdir(parents=True)  # part of it is there
    room.check_room(loaded, layout, notes.append)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_storage_is_told_as_such(code):
    error = explained(OSError(code, "No space left on device", "/s/x"), Folder("/s"))
    assert isinstance(error, WorkflowError)
    assert "the storage /s is full" in str(error)
    other = OSError(errno.EACCES, "Permission denied")
    assert explained(other, Folder("/s")) is other


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"text": {"weights": "/nowhere/model"}}, "model.text.weights: cannot load /nowhere/model"),
        ({"tower": {"weights": "/nowhere/tower.pth"}}, "model.vision.towers.0.weights: there is no file"),
        ({"tower": {"weights": "package:nowhere_at_all/x"}}, "package nowhere_at_all is not installed"),
    ],
)
def test_weights_that_are_not_there_are_told_before_the_data_is_prepared(part, message):
    content = recipe(Path("/nowhere"))
    content["model"]["text"] |= part.get("text", {})
    content["model"]["vision"]["towers"][0] |= part.get("tower", {})
    with pytest.raises(UsageError, match=message):
        check_weights(Recipe.model_validate(content).model)


def test_a_language_model_of_another_size_is_told_before_the_data_is_prepared(tmp_path):
    content = recipe(Path("/nowhere"))
    content["model"]["text"]["weights"] = str(tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 64, "n_layer": 2, "vocab_size": 300}')
    with pytest.raises(UsageError, match="has hidden_size 64, the recipe says 32"):
        check_weights(Recipe.model_validate(content).model)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="is no Mamba-2 language model"):
        check_weights(Recipe.model_validate(content).model)
    (tmp_path / "config.json").write_text('{"d_model": 32, "n_layer": 2, "vocab_size": 300}')
    check_weights(Recipe.model_validate(content).model)
