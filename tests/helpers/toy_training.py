"""A prepared toy data set and model, and stages trained on it by two real worker processes, without Ray around them.

Ray Train takes seconds to start workers that import torch and DeepSpeed. These stay, joined by gloo, and run one stage
after the other; what they run is the worker's own loop.
"""

import contextlib
import multiprocessing
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

import ray
import torch
from safetensors.torch import load_file

from pipelines.prepare import prepare
from tests.helpers.toy_worker import serve
from tests.helpers.toy_workflow import recipe, write_corpus
from workflows.recipe.schema import Recipe
from workflows.recipe.train import TrainRecipe
from workflows.train.initial import build_initial, image_tokens
from workflows.train.job import StageJob

STAGE = {"name": "full", "trains": ["connector", "language_model"], "learning_rate": 0.003, "batch_rows": 4, "steps": 8}


@dataclass
class Toy:
    """Folders of a toy: `data` (with a validation split) and `initial`, the model before training.

    `model` replaces parts of the recipe's model.
    """

    root: Path
    model: dict | None = None
    recipe: Recipe = field(init=False)

    def __post_init__(self):
        write_corpus(self.root / "corpus")
        content = recipe(self.root / "corpus")
        content["data"]["validation"] = content["data"]["test"]
        content["model"] |= self.model or {}
        self.recipe = Recipe.model_validate(content)
        self.data, self.initial = self.root / "data", self.root / "initial"
        prepare(self.recipe.data, str(self.data), image_tokens(self.recipe.model), self.recipe.seed)
        build_initial(self.recipe, self.data, self.initial)

    def job(self, out: Path, stage: dict | None = None, **train) -> StageJob:
        """A job with its results under `out`. `stage` and `train` change the recipe's fields."""
        settings = {"workers": 2, "save_every": 100, "log_every": 1, **train}
        checked = TrainRecipe.model_validate({**settings, "stages": [STAGE | (stage or {})]})
        return StageJob(
            stage=checked.stages[0],
            train=checked,
            seed=self.recipe.seed,
            data=str(self.data),
            start_from=str(self.initial),
            export_to=str(out / "model"),
            checkpoints=str(out / "checkpoints"),
            threads=1,
        )


def make_toy(root: Path, model: dict | None = None) -> Toy:
    """A toy, prepared with the Ray that is up, or else one of its own."""
    if ray.is_initialized():
        return Toy(root, model)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        return Toy(root, model)
    finally:
        ray.shutdown()


@dataclass
class Outcome:
    """What became of a stage: `result` as `Worker.train` returns it, rank 0's events, and its folder."""

    result: str
    events: list[dict]
    folder: Path

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.of("metrics")]

    def of(self, kind: str) -> list[dict]:
        """The events of a kind."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def weights(self) -> dict:
        """The exported model's tensors."""
        return load_file(self.folder / "model" / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    """Whether two models' tensors are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def difference(one: dict, other: dict) -> float:
    """The largest difference between two models' tensors."""
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


class Workers:
    """Processes joined by gloo. `train` runs a stage on all of them."""

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, count, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        port = self._pipes[0].recv()
        for pipe in self._pipes[1:]:
            pipe.send(port)

    def train(self, job: StageJob, stop_after: int | None = None) -> Outcome:
        """Run a stage.

        Args:
            stop_after: leave all at once after this step, as a kill would, but with what is being written written.

        Raises:
            RuntimeError: a worker failed; the message is its traceback.
        """
        for pipe in self._pipes:
            pipe.send((job, stop_after))
        answers: dict = {}
        while len(answers) < len(self._pipes):
            for pipe in connection.wait([pipe for pipe in self._pipes if pipe not in answers]):
                answers[pipe] = pipe.recv()
                if isinstance(answers[pipe], str):  # the others may wait for this one for ever
                    for process in self._processes:
                        process.kill()
                    raise RuntimeError(answers[pipe])
        return Outcome(*answers[self._pipes[0]], Path(job.export_to).parent)

    def processes(self) -> list[int]:
        """Their process ids."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End them."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()
