"""Features that are kept: those of the encoder, made once, found again, and not made where that does not pay."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mlmamba.images import load_pixels
from tests.helpers.images import encoded
from tests.helpers.tiny import prompt, tiny_model
from workflows.recipe.train import StageRecipe, TrainRecipe
from workflows.train import features
from workflows.train.features import INDEX, Pays, keep_features
from workflows.train.job import StageError

pytestmark = pytest.mark.usefixtures("process_group")


class Images:
    """A data set of rows with two images each; image i is in row i and the next."""

    def __init__(self, count: int):
        self.images = [encoded(i) for i in range(count)]
        split = SimpleNamespace(rows=count, images=2 * count)
        self.manifest = SimpleNamespace(pixels=2, splits={"train": split})

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return SimpleNamespace(images=[self.images[index], self.images[index - 1]], pixels=2)


def keep(model, data, tmp_path, wish: str = "auto", precision: str = "fp32", said: list | None = None, **changes):
    fields = {"name": "s", "trains": ["connector"], "steps": 20, "learning_rate": 1.0, "batch_rows": 1}
    stage = StageRecipe(**fields | {"keep_features": wish} | changes)
    train = TrainRecipe(workers=1, stages=[stage], precision=precision)
    (tmp_path / "data").mkdir(exist_ok=True)
    place = str(tmp_path / "data")
    return keep_features(model, [data], place, stage, train, (0, 1), [].append if said is None else said.append)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(features, "_PART", 3)
    monkeypatch.setattr(features, "_AT_ONCE", 2)


def test_they_are_those_of_the_encoder_in_any_order(model, tmp_path, small_parts):
    data = Images(7)
    kept = keep(model, data, tmp_path)
    wanted = [data.images[i] for i in (6, 0, 3, 0)]
    size = model.config.vision_config.image_size
    with torch.no_grad():
        direct = model.vision(torch.from_numpy(np.stack([load_pixels(image, size, 2) for image in wanted])))
    assert torch.allclose(kept.of(wanted), direct, atol=1e-5)
    assert kept.of([]).shape == (0, *direct.shape[1:])
    with pytest.raises(KeyError):
        kept.of([encoded(99)])


def test_the_model_takes_them_in_place_of_pixels(model, tmp_path):
    data = Images(4)
    kept = keep(model, data, tmp_path).of(data.images[:1])
    pixels = torch.from_numpy(load_pixels(data.images[0], model.config.vision_config.image_size, 2))[None]
    ids = prompt(9, 1)
    with torch.no_grad():
        seen = model(input_ids=ids, pixel_values=pixels).logits
        assert torch.allclose(model(input_ids=ids, vision_features=kept).logits, seen, atol=1e-4)
        assert model._from_vision(kept[:0]).shape[0] == 0
        with pytest.raises(ValueError, match="both pixel_values and vision_features are given"):
            model(input_ids=ids, vision_features=kept, pixel_values=pixels)
        with pytest.raises(ValueError, match=r"vision_features is \(1, 3\); expected"):
            model(input_ids=ids, vision_features=torch.zeros(1, 3))


def test_what_is_there_is_found_again_and_a_killed_run_goes_on(model, tmp_path, small_parts):
    data, said = Images(7), []
    before = keep(model, data, tmp_path, said=said).of(data.images)
    (folder,) = (tmp_path / "data" / "features").iterdir()
    assert sorted(file.name for file in folder.glob("*.npy")) == ["00000.npy", "00001.npy", "00002.npy", INDEX]
    keep(model, data, tmp_path, said=said)
    assert [text.partition(" ")[0] for text in said] == ["computing", "the"]
    (folder / INDEX).unlink()
    (folder / "00001.npy").unlink()
    first = (folder / "00000.npy").stat().st_mtime_ns
    assert torch.equal(keep(model, data, tmp_path).of(data.images), before)
    assert (folder / "00000.npy").stat().st_mtime_ns == first


def test_another_encoder_other_images_and_another_precision_have_others(model, tmp_path):
    data = Images(4)
    keep(model, data, tmp_path)
    other = tiny_model()
    with torch.no_grad():
        next(other.vision.parameters()).add_(0.1)
    changed = keep(other, data, tmp_path).of(data.images)
    assert not torch.allclose(changed, keep(model, data, tmp_path).of(data.images))
    keep(model, Images(5), tmp_path)
    half = keep(model, data, tmp_path, precision="bf16").of(data.images)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), keep(model, data, tmp_path).of(data.images), atol=0.05, rtol=0.05)
    assert len(list((tmp_path / "data" / "features").iterdir())) == 4


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"steps": 1}, "an image is shown 0.25 times"),
        ({"trains": ["connector", "vision"]}, "images or encoder change"),
        ({"augment": {"flip": True}}, "images or encoder change"),
    ],
)
def test_auto_keeps_none_where_it_does_not_pay_and_says_why(model, tmp_path, changes, why):
    said = []
    assert keep(model, Images(4), tmp_path, said=said, **changes) is None
    assert said == [f"features of the frozen encoder are not kept: {why}"]
    assert not list((tmp_path / "data").rglob("*.npy"))
    assert keep(model, Images(4), tmp_path, "never") is None


def test_disk_and_passes_decide():
    assert Pays(2.0, 5, 10).why_not == ""
    assert Pays(1.0, 5, 10).why_not == "an image is shown 1 times"
    assert "they would take 6.0 GiB of the 10.0 GiB that are free" in Pays(9, 6 << 30, 10 << 30).why_not


def test_a_full_disk_is_one_line_and_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "_write", full)
    said = []
    assert keep(model, Images(4), tmp_path, said=said) is None
    assert "not kept: the disk is full (while writing to" in said[-1]
    with pytest.raises(StageError, match="keep_features is always, and features cannot be kept: the disk is full"):
        keep(model, Images(4), tmp_path, "always")
    assert not list((tmp_path / "data" / "features").iterdir())
    shutil.rmtree(tmp_path / "data")


@pytest.mark.parametrize("changes", [{"augment": {"flip": True}}, {"trains": ["vision"]}])
def test_always_beside_what_changes_them_is_refused_before_work(changes):
    fields = {"name": "s", "trains": ["connector"], "steps": 1, "learning_rate": 1.0, "batch_rows": 1}
    with pytest.raises(ValidationError, match=r"keep_features is always, beside (augment|vision), which"):
        StageRecipe(**fields | {"keep_features": "always"} | changes)
