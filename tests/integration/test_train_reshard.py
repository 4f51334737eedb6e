"""`mlmamba reshard` writes the files that DeepSpeed would have written with so many workers, or changes nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.toy_training import Toy, Workers, same
from workflows.cli import execute, parse
from workflows.errors import UsageError, WorkflowError
from workflows.storage.folder import WHOLE, Folder
from workflows.storage.lock import lock
from workflows.train.checkpoint import CheckpointStore
from workflows.train.job import StageJob
from workflows.train.reshard import reshard_run
from workflows.train.saver import load_plain

STAGE = {"weight_decay": 0.1, "batch_rows": 6}
ZERO = (1, 2, 3)


@pytest.fixture(scope="module")
def three():
    """Three training workers joined by gloo."""
    group = Workers(3)
    yield group
    group.close()


def job_of(toy: Toy, run: Path, workers: int, zero: int) -> StageJob:
    job = toy.job(run, STAGE, zero_stage=zero, save_every=2, workers=workers)
    return replace(job, checkpoints=str(run / "checkpoints" / "full-key"))


@pytest.fixture(scope="module")
def runs(toy, workers, three, tmp_path_factory) -> dict[tuple[int, int], Path]:
    """A run folder stopped at step 2, by (workers, zero stage)."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    for count, group in ((2, workers), (3, three)):
        for zero in ZERO if count == 3 else (0, *ZERO):
            run = root / f"{count}-{zero}"
            group.train(job_of(toy, run, count, zero), stop_after=2)
            shutil.copytree(toy.initial, run / "initial")
            found[count, zero] = run
    return found


@pytest.fixture
def run(runs, tmp_path):
    """Gives a copy of a run."""

    def copy(workers: int, zero: int) -> Path:
        return Path(shutil.copytree(runs[workers, zero], tmp_path / f"{workers}-{zero}"))

    return copy


def checkpoint(run: Path) -> Path:
    (found,) = CheckpointStore(Folder(str(run / "checkpoints" / "full-key"))).whole()
    return found.folder


def outline(value):
    """Everything of a file but the numbers in its tensors, and what depends on the batch."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, dict):
        skipped = ("global_samples", "gradient_accumulation_steps")
        return [(key, outline(one)) for key, one in value.items() if key not in skipped]
    if isinstance(value, list | tuple):
        return [outline(one) for one in value]
    return repr(value) if type(value).__module__.startswith("deepspeed") else value


def numbers(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in numbers(part)]


@pytest.mark.parametrize("zero", ZERO)
def test_the_files_are_those_that_so_many_workers_write(run, zero):
    ours, theirs = run(2, zero), checkpoint(run(3, zero))
    done = reshard_run(Folder(str(ours)), 3)
    made = checkpoint(ours)
    assert (done.made_by, done.workers, done.checkpoint.workers, done.checkpoint.folder) == (2, 3, 3, made)
    names = {file.name for file in theirs.iterdir()}
    assert {file.name for file in made.iterdir()} == names
    for name in sorted(name for name in names if name.endswith(".pt")):
        assert outline(load_plain(made / name)) == outline(load_plain(theirs / name))


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("between", [1, 3, 5])
def test_there_and_back_is_the_same_to_the_last_bit(run, zero, between):
    there = run(2, zero)
    before = {file.name: load_plain(file) for file in checkpoint(there).glob("*.pt")}
    reshard_run(Folder(str(there)), between)
    reshard_run(Folder(str(there)), 2)
    after = checkpoint(there)
    assert {file.name for file in after.glob("*.pt")} == before.keys()
    for name, content in before.items():
        pairs = zip(numbers(content), numbers(load_plain(after / name)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZERO)
def test_three_workers_go_on_from_it_as_from_the_checkpoint_of_two(toy, three, run, zero):
    made = run(2, zero)
    automatic = Path(shutil.copytree(made, made.with_name("automatic")))
    reshard_run(Folder(str(made)), 3)
    outcomes = [three.train(job_of(toy, folder, 3, zero)) for folder in (made, automatic)]
    assert [one.of("start")[0]["resharded_from"] for one in outcomes] == [None, 2]
    assert outcomes[0].losses == outcomes[1].losses
    assert same(outcomes[0].weights, outcomes[1].weights)


def test_what_needs_no_resharding_stays_as_it_is(run):
    for zero, workers, text in ((2, 2, "one of 2 workers already"), (0, 5, "has no shards")):
        there = run(2, zero)
        before = checkpoint(there)
        assert text in str(reshard_run(Folder(str(there)), workers))
        assert checkpoint(there) == before


@pytest.mark.parametrize("change", ["shape", "name"])
def test_a_checkpoint_of_another_model_is_refused(run, change):
    from safetensors.torch import load_file, save_file

    there = run(2, 2)
    file = there / "initial" / "model.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop("connector.projector.0.weight")
    if change == "shape":
        tensors["connector.projector.0.weight"] = tensor[:-1].clone()
    save_file(tensors, file)
    before = checkpoint(there)
    with pytest.raises(WorkflowError, match=r"is of another model: connector.projector.0.weight has the shape"):
        reshard_run(Folder(str(there)), 3)
    assert checkpoint(there) == before


@pytest.mark.parametrize(
    ("number", "message"),
    [(0, "give at least 1"), (7, "a step has 6 micro batches of 1 rows, so more than 6 workers have nothing to do")],
)
def test_a_number_that_does_not_fit_is_refused(run, number, message):
    there = run(2, 2)
    before = checkpoint(there)
    with pytest.raises(UsageError, match=message):
        reshard_run(Folder(str(there)), number)
    assert checkpoint(there) == before


def test_a_run_that_trains_is_left_alone(run):
    there = run(2, 2)
    with lock(there / "lock.json", "recipe toy"), pytest.raises(WorkflowError, match="recipe toy is under way already"):
        reshard_run(Folder(str(there)), 3)


def test_what_is_no_run_or_has_no_checkpoint_is_named(run, tmp_path):
    with pytest.raises(UsageError, match="has no checkpoints: name the folder of a run"):
        reshard_run(Folder(str(tmp_path / "nowhere")), 2)
    there = run(2, 2)
    with pytest.raises(UsageError, match=r"stage connector of .* has no whole checkpoint"):
        reshard_run(Folder(str(there)), 3, "connector")
    (checkpoint(there) / WHOLE).unlink()
    with pytest.raises(UsageError, match="has no whole checkpoint: there is nothing to reshard"):
        reshard_run(Folder(str(there)), 3)


def test_what_strangers_leave_there_is_named_in_one_line(run, tmp_path, capsys):
    there = run(2, 2)
    file = checkpoint(there) / "mp_rank_00_model_states.pt"
    torch.save({"epoch": 3}, file)
    about = json.loads((file.parent / WHOLE).read_text())
    about["files"][file.name] = file.stat().st_size
    (file.parent / WHOLE).write_text(json.dumps(about))
    assert execute(parse(["reshard", str(there), "--workers", "3"])) == (1, None)
    assert "is no checkpoint that this version can read: KeyError('param_shapes')" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file")
    assert execute(parse(["reshard", str(tmp_path / "run"), "--workers", "3"])) == (1, None)
    assert capsys.readouterr().err.splitlines()[-1].startswith("mlmamba: reshard: ")


def test_of_two_stages_one_must_be_named(run):
    there = run(2, 2)
    shutil.copytree(there / "checkpoints" / "full-key", there / "checkpoints" / "connector-key")
    with pytest.raises(UsageError, match=r"2 stages \(connector-key, full-key\): name one by --stage"):
        reshard_run(Folder(str(there)), 3)
    assert reshard_run(Folder(str(there)), 3, "full").stage == "full"


def test_a_full_disk_leaves_the_checkpoint_that_was_there(run, monkeypatch):
    there, before, written = run(2, 2), None, []
    before = checkpoint(there)

    def fill(path, state):
        if written:
            raise OSError(28, "No space left on device", str(path))
        written.append(path.write_bytes(b"half"))

    monkeypatch.setattr("workflows.train.reshard.write_file", fill)
    code, _ = execute(parse(["reshard", str(there), "--workers", "3"]))
    assert code == 1
    assert checkpoint(there) == before
    assert [folder.name for folder in before.parent.iterdir()] == [before.name]


def test_a_damaged_one_is_passed_over_and_said(run):
    there, told = run(2, 2), []
    newest = checkpoint(there)
    older = shutil.copytree(newest, newest.with_name("step-00000001.old"))
    about = json.loads((older / WHOLE).read_text())
    (older / WHOLE).write_text(json.dumps({**about, "step": 1}))
    file = next(newest.glob("*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert reshard_run(Folder(str(there)), 3, note=told.append).checkpoint.step == 1
    assert "is damaged and passed over" in told[0]


def test_the_command_says_what_it_did(run):
    code, result = execute(parse(["reshard", str(run(2, 2)), "--workers", "3"]))
    assert code == 0
    assert result["text"].startswith("stage full, step 2: ")
    assert "is a checkpoint of 3 workers (" in result["text"]
    assert result["text"].endswith("in place of the one of 2")
    assert (result["made_by"], result["workers"], result["step"]) == (2, 3, 2)
