"""The best step of a stage by the validation split: its weights are kept, and exported in place of the last ones.

    <checkpoints>/best-00000040.safetensors    what the stage trains, whole and plain, whatever ZeRO made of it

A file is there before any checkpoint that knows of its step, and stays as long as one does: a stage that resumes from
an older checkpoint finds the step that was best by then, and another number of workers reads the same file. Writing it
holds the step for as long as gathering and writing the trained weights takes.
"""

import math
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from workflows.recipe.train import BestRecipe
from workflows.train.checkpoint import CheckpointStore
from workflows.train.export import gather
from workflows.train.validation import Measured


class BestStep:
    """Which step was best so far.

    Args:
        recipe: what counts, and for how long to wait.
        store: the stage's checkpoints.
        rank: this one; all ranks see the same measurements, rank 0 reads and writes.
        known: `saved` of the checkpoint that the stage goes on from. Forgotten, on all ranks, where its file is gone.

    Attributes:
        step: the best; None before the first measurement.
        waited: whether the recipe's patience is at its end.
    """

    def __init__(self, recipe: BestRecipe, store: CheckpointStore, rank: int, known: dict | None = None):
        self._recipe, self._store, self._rank = recipe, store, rank
        there = [bool(known) and (rank > 0 or store.has_file(_name(known["step"])))]
        dist.broadcast_object_list(there)
        known = known if there[0] and known else {}
        self.step: int | None = known.get("step")
        self._value: list[float] = known.get("value", [])
        self._since, self._seen = known.get("since", 0), known.get("seen", 0)
        self._in_checkpoints = self.step

    @property
    def waited(self) -> bool:
        return self._recipe.patience is not None and self._since >= self._recipe.patience

    def see(self, step: int, found: Measured) -> bool:
        """Take a measurement. Returns whether it is the best; `keep` must then follow."""
        value = [-found.loss] if self._recipe.by == "loss" else [found.score, -found.loss]
        self._seen += 1
        if not math.isfinite(found.loss) or (self._value and value <= self._value):
            self._since += 1
            return False
        self.step, self._value, self._since = step, value, 0
        return True

    def keep(self, engine) -> str:
        """Write the weights; a collective call. Returns what went wrong, on all ranks, or ""."""
        tensors, problem = gather(engine, changed=True), [""]
        if self._rank == 0:
            try:
                self._store.write_file(_name(self.step), lambda path: save_file(tensors, path))
                known = [(checkpoint.best or {}).get("step") for checkpoint in self._store.whole()]
                wanted = {self.step, self._in_checkpoints, *known} - {None}
                self._store.keep_files("best-", set(map(_name, wanted)))
            except (OSError, SafetensorError) as error:  # the latter where the disk is full
                problem = [f"the weights of its best step {self.step} could not be kept: {error}"]
        dist.broadcast_object_list(problem)
        return problem[0]

    def saved(self) -> dict:
        """What a checkpoint must know to go on from."""
        self._in_checkpoints = self.step
        return {"step": self.step, "value": self._value, "since": self._since, "seen": self._seen}

    def fetch(self) -> Path:
        """The kept weights as a file of this machine. Raises OSError."""
        return self._store.fetch_file(_name(self.step))

    def told(self, steps: int) -> str:
        """For people: which step is taken, and why."""
        score = f"score {self._value[0]:.1%}, loss" if len(self._value) > 1 else "loss"
        early = f"; stopped early, after {self._since} without a better one" if self.waited else ""
        return f"takes step {self.step} of {steps} ({score} {-self._value[-1]:.3f}), the best of {self._seen}{early}"


def _name(step: int) -> str:
    return f"best-{step:08d}.safetensors"
