"""Saving without stopping the training: the state is copied to memory, and a thread writes it.

The pause of a save is the copy of this rank's share of the state into the CPU's memory; writing, waiting for the other
ranks and pruning go on beside the next steps. DeepSpeed decides what belongs into a checkpoint and in which files; in
place of its writer it gets one that keeps what it is given. The price is memory for one more copy of the share. A save
that comes while the one before is still being written waits for it.
"""

import contextlib
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from workflows.train.checkpoint import Checkpoint, all_listed, complete, folder_name, list_files, partial_folder

ATTEMPTS = 3
"""How often writing is tried; a hiccup of a network file system should not end a training of days."""
_PAUSE = 2.0  # seconds before writing is tried again
_PLAIN = [LossScaler, ZeroStageEnum, fragment_address, OrderedDict, torch.Size]  # what else DeepSpeed's states hold


class MemoryEngine(CheckpointEngine):
    """DeepSpeed's checkpoint engine that keeps copies in memory, by file name, and reads no pickled code."""

    def __init__(self):
        super().__init__()
        self.name = "MemoryEngine"
        self.files: dict[str, dict] = {}

    def attach(self, engine) -> None:
        """Make an engine's `save_checkpoint` save here. It then touches no disk, so that it fails on none: one rank's
        error there would leave the others waiting for it."""
        engine.checkpoint_engine = self
        engine._copy_recovery_script = lambda folder: None  # scripts that DeepSpeed leaves beside a checkpoint

    def create(self, info) -> None:
        self.files = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: there are no folders here."""

    def save(self, state_dict: dict, path: str) -> None:
        self.files[Path(path).name] = _copy(state_dict)

    def load(self, path: str, map_location=None) -> dict:
        return load_plain(path, map_location, mapped=False)  # what is loaded outlives the file

    def commit(self, info) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        return False


class Saver:
    """Writes a rank's checkpoints in the background.

    Args:
        root: folder of the stage's checkpoints, the same on all ranks.
        attempt: the same on all ranks, and of this start of the workers alone.
        rank, workers: this rank, and how many there are.
        keep: checkpoints that stay.
        on_done: called with the step and the seconds that writing took, on rank 0, when a checkpoint is whole.
    """

    def __init__(
        self, root: Path, attempt: str, rank: int, workers: int, keep: int, on_done: Callable[[int, float], None]
    ):
        self._root, self._attempt, self._rank, self._workers, self._keep = root, attempt, rank, workers, keep
        self._on_done = on_done
        self._thread: threading.Thread | None = None
        self._partial: Path | None = None
        self._written, self._gave_up = threading.Event(), threading.Event()
        self.problem = ""
        """Why this rank could not write a checkpoint, for people; "" when all is well."""

    def save(self, engine, step: int, about: dict) -> None:
        """Copy the state, and begin to write it; a collective call, after one of `settle`.

        Args:
            about: `zero_stage`, `model` and `lowest_loss` of the Checkpoint.
        """
        engine.checkpoint_engine.files = {}
        engine.save_checkpoint("memory", tag="state", save_latest=False, exclude_frozen_parameters=True)
        files, engine.checkpoint_engine.files = engine.checkpoint_engine.files, {}
        target = self._root / folder_name(step)
        checkpoint = Checkpoint(folder=target, step=step, workers=self._workers, files={}, **about)
        self._partial = partial_folder(self._root, step, self._attempt)
        self._written.clear()
        self._thread = threading.Thread(target=self._write, args=(files, checkpoint), name="checkpoint", daemon=True)
        self._thread.start()

    def settle(self) -> list[str]:
        """Wait until nothing is being written; a collective call. Returns the problems of all ranks: none, if the
        checkpoint before is whole."""
        if self._thread is not None:
            self._written.wait()
        mine: list[str] = [self.problem] * self._workers
        dist.all_gather_object(mine, self.problem)
        if any(mine):
            self._gave_up.set()  # rank 0 would wait for files that do not come
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        completing = [self.problem]
        dist.broadcast_object_list(completing)
        problems = [problem for problem in dict.fromkeys([*mine, *completing]) if problem]
        if problems and self._rank == 0 and self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        return problems

    def _write(self, files: dict[str, dict], checkpoint: Checkpoint) -> None:
        start, partial = time.monotonic(), self._partial
        try:
            self._write_or_try_again(files, checkpoint.step, partial)
        finally:
            self._written.set()
        files.clear()
        if self.problem or self._rank:
            return
        while not all_listed(partial, self._workers):
            if self._gave_up.wait(0.05):
                return
        try:
            complete(partial, checkpoint, self._keep)
        except OSError as error:
            self.problem = _describe(error, checkpoint.step, self._root)
            return
        self._on_done(checkpoint.step, time.monotonic() - start)

    def _write_or_try_again(self, files: dict[str, dict], step: int, partial: Path) -> None:
        for attempt in range(ATTEMPTS):
            time.sleep(_PAUSE if attempt else 0)
            try:
                self._write_files(files, partial)
            except Exception as error:  # torch wraps an OSError into errors of its own
                for name in files:
                    with contextlib.suppress(OSError):
                        (partial / name).unlink()
                self.problem = _describe(error, step, self._root)
            else:
                self.problem = ""
                return

    def _write_files(self, files: dict[str, dict], partial: Path) -> None:
        partial.mkdir(parents=True, exist_ok=True)
        for name, state in files.items():
            with open(partial / name, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        list_files(partial, self._rank, list(files))


def load_plain(path: str | Path, map_location: str | torch.device | None = "cpu", mapped: bool = True) -> dict:
    """A file of a checkpoint: tensors, plain values and the few classes that DeepSpeed puts there.

    Args:
        mapped: leave the tensors on the disk until they are read.
    """
    with torch.serialization.safe_globals(_PLAIN):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)


def _copy(state):
    """A copy in memory that later steps do not change; shapes stay shapes."""
    if isinstance(state, torch.Size):
        return state
    if isinstance(state, dict):
        return type(state)({key: _copy(value) for key, value in state.items()})
    if isinstance(state, list | tuple):
        return type(state)(_copy(value) for value in state)
    return clone_tensors_for_torch_save(state)


def _describe(error: Exception, step: int, root: Path) -> str:
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    reason = cause.strerror or str(cause) if cause is not None else str(error).strip().splitlines()[0]
    try:
        free = f"{shutil.disk_usage(root).free / 2**30:.1f} GiB free there"
    except OSError:
        free = "the folder cannot be read"
    return f"the checkpoint of step {step} could not be written to {root}: {reason} ({free})"
