"""Which step is best, for how long to wait, and when what is kept may go: without an engine, in one process."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from workflows.recipe.train import BestRecipe, TrainRecipe
from workflows.storage.folder import Folder
from workflows.train.best import BestStep
from workflows.train.checkpoint import Checkpoint, CheckpointStore
from workflows.train.validation import Measured, count_right

pytestmark = pytest.mark.usefixtures("process_group")


class Engine:
    """What `gather` asks of DeepSpeed's."""

    global_rank = 0

    def __init__(self):
        self.module = nn.ModuleDict({"connector": nn.Linear(2, 2), "vision": nn.Linear(2, 2).requires_grad_(False)})

    def zero_optimization_stage(self) -> int:
        return 0


def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(Folder(tmp_path / "checkpoints"))


def see(best: BestStep, *scores: float, loss: float = 1.0) -> list[bool]:
    return [best.see(step, Measured(loss, score)) for step, score in enumerate(scores, 1)]


def test_a_step_is_better_by_its_score_and_of_equal_ones_by_its_loss(tmp_path):
    best = BestStep(BestRecipe(patience=2), store(tmp_path), 0)
    assert see(best, 0.5, 0.6, 0.6, 0.5) == [True, True, False, False]
    assert (best.step, best.waited) == (2, True)
    assert best.see(5, Measured(0.9, 0.6))
    assert (best.step, best.waited) == (5, False)
    assert best.told(9) == "takes step 5 of 9 (score 60.0%, loss 0.900), the best of 5"


def test_by_loss_the_score_does_not_count_and_what_is_no_number_is_never_best(tmp_path):
    best = BestStep(BestRecipe(by="loss", patience=3), store(tmp_path), 0)
    assert not best.see(1, Measured(float("nan"), 0.9))
    assert best.step is None
    assert best.see(2, Measured(2.0, 0.1))
    assert not best.see(3, Measured(2.5, 0.9))
    assert not best.waited
    assert see(best, 0, loss=float("inf")) == [False]
    assert see(best, 1, loss=3) == [False]
    assert best.waited
    assert best.told(8).endswith("(loss 2.000), the best of 5; stopped early, after 3 without a better one")


def test_without_patience_all_steps_are_done(tmp_path):
    best = BestStep(BestRecipe(), store(tmp_path), 0)
    see(best, 0.5, *[0.4] * 50)
    assert not best.waited


def test_a_checkpoint_goes_on_with_what_was_known(tmp_path):
    best, engine = BestStep(BestRecipe(patience=3), store(tmp_path), 0), Engine()
    see(best, 0.5, 0.4)
    best.step = 1
    assert best.keep(engine) == ""
    again = BestStep(BestRecipe(patience=3), store(tmp_path), 0, best.saved())
    assert (again.step, again.saved()) == (1, best.saved())
    assert see(again, 0.5, 0.5) == [False, False]
    assert again.waited
    again.fetch().unlink()
    assert BestStep(BestRecipe(), store(tmp_path), 0, best.saved()).step is None  # its weights are gone


def test_only_what_trains_is_kept_and_goes_when_no_checkpoint_knows_of_it(tmp_path):
    there, engine = store(tmp_path), Engine()
    best = BestStep(BestRecipe(), there, 0)

    def checkpoint(step: int) -> None:
        described = Checkpoint(there.disk, step, 1, 0, "m", None, {}, best.saved()).described()
        Folder(there.disk / f"step-{step:08d}.x").write("complete.json", described)

    def files() -> list[int]:
        return sorted(int(file.name[5:13]) for file in there.disk.glob("best-*"))

    for step in (10, 20, 30):
        best.see(step, Measured(1.0, step / 100))
        assert best.keep(engine) == ""
        if step == 20:
            checkpoint(20)
    assert files() == [20, 30]
    from safetensors.torch import load_file

    assert load_file(best.fetch()).keys() == {"connector.weight", "connector.bias"}
    checkpoint(30)
    Folder(there.disk / "step-00000020.x").delete()
    best.see(40, Measured(1.0, 0.9))
    best.keep(engine)
    assert files() == [30, 40]


def test_what_cannot_be_kept_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    best = BestStep(BestRecipe(), store(tmp_path), 0)
    best.see(3, Measured(1.0, 0.5))
    assert best.keep(Engine()).startswith("the weights of its best step 3 could not be kept: ")


def test_an_answer_is_right_when_each_of_its_tokens_is():
    labelled = torch.tensor([4, 5, 6, 9, 20, 21])
    correct = torch.tensor([True, True, True, False, True, True])
    assert count_right(labelled, correct) == (2, 3)
    assert count_right(labelled, ~correct) == (1, 3)
    assert count_right(labelled[:0], correct[:0]) == (0, 0)
    assert count_right(labelled[:1], correct[:1]) == (1, 1)


def test_best_wants_measurements():
    stage = {"name": "s", "trains": ["connector"], "steps": 1, "learning_rate": 1.0, "batch_rows": 1, "best": {}}
    with pytest.raises(ValidationError, match=r"best chooses among measurements .*: set train.validate_every"):
        TrainRecipe(workers=1, stages=[stage])
