"""What is measured at a stage's start: the fastest way is taken, once, and nothing else of the model changes."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from mlmamba.selective_scan import SelectiveScan
from tests.helpers.tiny import tiny_model
from workflows.errors import UsageError
from workflows.recipe.load import load_recipe
from workflows.recipe.train import StageRecipe, TrainRecipe
from workflows.storage.folder import Folder
from workflows.train import autotune
from workflows.train.autotune import FILE, ROWS, Chosen, choose
from workflows.train.checkpoint import CheckpointStore
from workflows.train.job import StageError, StageJob

pytestmark = pytest.mark.usefixtures("process_group")
STAGE = {"name": "full", "trains": ["connector", "language_model"], "steps": 4, "learning_rate": 0.1}
PARTS = ("connector", "language_model")


def a_job(tmp_path, rows="auto", batch_rows=4, chunks=PARTS) -> StageJob:
    stage = StageRecipe(**STAGE, batch_rows=batch_rows, micro_batch_rows=rows)
    train = TrainRecipe(workers=1, stages=[stage])
    places = dict.fromkeys(("data", "start_from", "export_to", "checkpoints"), str(tmp_path / "checkpoints"))
    return StageJob(stage=stage, train=train, seed=0, threads=1, measured_chunks=chunks, **places)


class Slow:
    """Micro batches whose pass takes as many seconds as it is told, on a clock that only they move."""

    def __init__(self, monkeypatch, model, seconds):
        self.now, self.model, self.seconds, self.passes = 0.0, model, seconds, 0
        monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def __call__(self, rows: int):
        return lambda indices: [SimpleNamespace(inputs={"rows": rows}) for _ in indices[::rows]]

    def loss(self, rows: int, **_):
        chunks = {part: scans(self.model, part)[0].chunk for part in PARTS}
        self.now += self.seconds(rows, chunks)
        self.passes += 1
        return SimpleNamespace(loss=torch.zeros((), requires_grad=True))


def scans(model, part: str) -> list[SelectiveScan]:
    return [module for module in getattr(model, part).modules() if isinstance(module, SelectiveScan)]


@pytest.fixture
def timed(monkeypatch):
    """`timed(seconds)` gives a model and a maker whose pass takes seconds(rows, chunks)."""

    def make(seconds):
        model = tiny_model()
        slow = Slow(monkeypatch, model, seconds)
        monkeypatch.setattr(type(model), "forward", lambda self, **inputs: slow.loss(**inputs))
        return model, slow

    return make


def run(job, model, make, said=None) -> Chosen:
    store = CheckpointStore(Folder(job.checkpoints))
    return choose(job, model, make, store, 0, print if said is None else said.append)


def test_the_fastest_is_taken_and_written_down(timed, tmp_path):
    model, make = timed(lambda rows, chunks: 0.1 * rows ** (0.8 if rows < 4 else 1.2) * (1 + (chunks[PARTS[1]] == 64)))
    said = []
    chosen = run(a_job(tmp_path), model, make, said)
    assert (chosen.micro_batch_rows, chosen.chunks["language_model"]) == (2, 16)
    assert {scan.chunk for scan in scans(model, "language_model")} == {16}
    assert json.loads((tmp_path / "checkpoints" / FILE).read_text()) == dataclasses.asdict(chosen)
    assert "micro_batch_rows 2 (1: 0.80, 2: " in said[0]
    assert "chunk_size of the language model 16 (16: " in said[0]


def test_more_at_once_must_save_something(timed, tmp_path):
    model, make = timed(lambda rows, chunks: 0.1 * rows * (0.99 if rows == 2 else 1))
    assert run(a_job(tmp_path), model, make).micro_batch_rows == 1


def test_an_image_of_few_cells_needs_no_measurement_of_its_scan(timed, tmp_path):
    model, make = timed(lambda rows, chunks: 0.1)
    cells = model.vision.grid[0] * model.vision.grid[1]
    chosen = run(a_job(tmp_path, rows=1, chunks=("connector",)), model, make)
    assert cells <= 16
    assert chosen.chunks == {"connector": 16}
    assert make.passes <= 4


def test_where_a_pass_takes_long_the_defaults_stay(timed, tmp_path):
    model, make = timed(lambda rows, chunks: 9.0 * rows)
    said = []
    chosen = run(a_job(tmp_path, batch_rows=2), model, make, said)
    assert (chosen.micro_batch_rows, chosen.chunks["language_model"]) == (1, autotune.UNMEASURED_CHUNK)
    assert make.passes == 2  # the two rows, once
    assert "micro_batch_rows 1 (not measured: a pass takes 18 s)" in said[0]


def test_what_was_chosen_stays_whatever_is_fastest_now(timed, tmp_path):
    model, make = timed(lambda rows, chunks: 0.1 * rows)
    first = run(a_job(tmp_path), model, make)
    model, make = timed(lambda rows, chunks: 0.1)
    said = []
    assert run(a_job(tmp_path), model, make, said) == first
    assert make.passes == 0
    assert "as measured at the first start" in said[0]
    assert {scan.chunk for scan in scans(model, "language_model")} == {first.chunks["language_model"]}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "\x00\xff", '{"micro_batch_rows": 3}', '{"micro_batch_rows": 2, "chunks": {"connector": 7}}',
     '{"micro_batch_rows": 2, "chunks": [1]}', '{"micro_batch_rows": [2], "chunks": {}}', '{"rows": 1}'],
)  # fmt: skip
def test_a_damaged_choice_is_measured_anew(timed, tmp_path, content):
    model, make = timed(lambda rows, chunks: 0.1 * rows)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / FILE).write_text(content, encoding="latin-1")
    said = []
    assert run(a_job(tmp_path), model, make, said).micro_batch_rows == 1
    assert "is damaged or of another stage: measured anew" in said[0]
    assert json.loads((tmp_path / "checkpoints" / FILE).read_text())[ROWS] == 1


def test_a_choice_that_cannot_be_kept_is_one_line(timed, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    model, make = timed(lambda rows, chunks: 0.1 * rows)
    monkeypatch.setattr(CheckpointStore, "write", full)
    with pytest.raises(
        StageError, match=r"stage full: what was chosen for it cannot be kept in .*checkpoints: .*No space"
    ):
        run(a_job(tmp_path), model, make)


def test_fixed_values_are_neither_measured_nor_written(timed, tmp_path):
    model, make = timed(lambda rows, chunks: 0.1)
    assert run(a_job(tmp_path, rows=2, chunks=()), model, make) == Chosen(2)
    assert make.passes == 0
    assert not (tmp_path / "checkpoints").exists()


def test_a_measurement_leaves_no_traces():
    model = tiny_model()
    model.vision.register_buffer("seen", torch.zeros(1))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with autotune._without_traces(model):
        assert model.training
        model.vision.seen += torch.rand(1)
        model.connector.projector[0].weight.sum().backward()
    assert not model.training
    assert model.vision.seen == 0
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("value", [0, -1, "many", True, 2.5, "", [1]])
def test_a_value_that_is_neither_is_refused(value):
    with pytest.raises(ValidationError, match="give a number above 0, or auto"):
        StageRecipe(**STAGE, batch_rows=4, micro_batch_rows=value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["train.stages.1.micro_batch_rows=fast"], "train.stages.1.micro_batch_rows: give a number above 0, or auto"),
        (["model.text.chunk_size=0"], "model.text.chunk_size: give a number above 0, or auto (given: 0)"),
        (["train.stages.1.micro_batch_rows=auto", "train.stages.1.batch_rows=3"], "does not divide into"),
        (["train.stages.1.micro_batch_rows=auto", "train.gpus_per_worker=1"], "auto is for workers on CPUs"),
        (["model.connector.chunk_size=auto", "train.gpus_per_worker=1"], "chunk_size = auto (of connector) is for"),
    ],
)
def test_a_recipe_that_cannot_measure_is_told_so(changes, expected):
    with pytest.raises(UsageError) as error:
        load_recipe("quickstart", changes)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 2  # the recipe, and the line
