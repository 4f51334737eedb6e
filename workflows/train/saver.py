"""Saving without stopping the training: the state is copied to memory, and a thread writes it.

The pause of a save is the copy of this rank's share of the state into the CPU's memory; writing, uploading to an object
store, waiting for the other ranks and pruning go on beside the next steps. DeepSpeed decides what belongs into a
checkpoint and in which files; in place of its writer it gets one that keeps what it is given. The price is memory for
one more copy of the share, which is kept for the next save. A save that comes while the one before is still being
written waits for it.
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

from workflows.train.checkpoint import Checkpoint, CheckpointStore

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
        self._memory: dict[tuple, torch.Tensor] = {}

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
        self.files[Path(path).name] = self._copy(state_dict, (Path(path).name,))

    def load(self, path: str, map_location=None) -> dict:
        return load_plain(path, map_location, mapped=False)  # what is loaded outlives the file

    def _copy(self, state, at: tuple):
        """A copy that later steps do not change; shapes stay shapes. A tensor goes into the memory that it had in the
        checkpoint before: memory that is new has to be made page by page, at a tenth of the speed."""
        if isinstance(state, dict):
            return type(state)({key: self._copy(value, (*at, key)) for key, value in state.items()})
        if isinstance(state, list | tuple) and not isinstance(state, torch.Size):
            return type(state)(self._copy(value, (*at, i)) for i, value in enumerate(state))
        if not isinstance(state, torch.Tensor):
            return state
        there = self._memory.get(at)
        if there is None or (there.shape, there.dtype) != (state.shape, state.dtype):
            self._memory[at] = clone_tensors_for_torch_save(state)
        else:
            there.copy_(state.detach())
        return self._memory[at]

    def commit(self, info) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        return False


class Saver:
    """Writes a rank's checkpoints in the background.

    Args:
        store: the stage's checkpoints, the same on all ranks.
        attempt: the same on all ranks, and of this start of the workers alone.
        rank, workers: this rank, and how many there are.
        keep: checkpoints that stay.
        on_done: called with the step and the seconds that writing took, on rank 0, when a checkpoint is whole.
    """

    def __init__(
        self,
        store: CheckpointStore,
        attempt: str,
        rank: int,
        workers: int,
        keep: int,
        on_done: Callable[[int, float], None],
    ):
        self._store, self._attempt, self._rank, self._workers, self._keep = store, attempt, rank, workers, keep
        self._on_done = on_done
        self._thread: threading.Thread | None = None
        self._staging: Path | None = None
        self._written, self._gave_up = threading.Event(), threading.Event()
        self.problem = ""
        """Why this rank could not write a checkpoint, for people; "" when all is well."""

    def save(self, engine, step: int, about: dict) -> None:
        """Copy the state, and begin to write it; a collective call, after one of `settle`.

        Args:
            about: `zero_stage`, `model`, `lowest_loss` and `best` of the Checkpoint.
        """
        engine.checkpoint_engine.files = {}
        engine.save_checkpoint("memory", tag="state", save_latest=False, exclude_frozen_parameters=True)
        files, engine.checkpoint_engine.files = engine.checkpoint_engine.files, {}
        self._staging = self._store.staging(step, self._attempt)
        checkpoint = Checkpoint(folder=self._staging, step=step, workers=self._workers, files={}, **about)
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
        if problems and self._rank == 0 and self._staging is not None:
            with contextlib.suppress(OSError):
                self._store.discard(self._staging)
        return problems

    def _write(self, files: dict[str, dict], checkpoint: Checkpoint) -> None:
        start, staging = time.monotonic(), self._staging
        try:
            self._write_or_try_again(files, checkpoint.step, staging)
        finally:
            self._written.set()
        files.clear()
        if self.problem or self._rank:
            return
        try:
            while not self._store.all_listed(staging, self._workers):
                if self._gave_up.wait(self._store.poll):
                    return
            self._store.complete(staging, checkpoint, self._keep)
        except OSError as error:
            self.problem = _describe(error, checkpoint.step, self._store)
            return
        self._on_done(checkpoint.step, time.monotonic() - start)

    def _write_or_try_again(self, files: dict[str, dict], step: int, staging: Path) -> None:
        for attempt in range(ATTEMPTS):
            time.sleep(_PAUSE if attempt else 0)
            try:
                self._write_files(files, staging)
            except Exception as error:  # torch wraps an OSError into errors of its own
                for name in files:
                    with contextlib.suppress(OSError):
                        (staging / name).unlink()
                self.problem = _describe(error, step, self._store)
            else:
                self.problem = ""
                return

    def _write_files(self, files: dict[str, dict], staging: Path) -> None:
        staging.mkdir(parents=True, exist_ok=True)
        for name, state in files.items():
            write_file(staging / name, state)
        self._store.publish(staging, self._rank, list(files))


def write_file(path: Path, state: dict) -> None:
    """Write a file of a checkpoint, which is on the disk when this returns."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load_plain(path: str | Path, map_location: str | torch.device | None = "cpu", mapped: bool = True) -> dict:
    """A file of a checkpoint: tensors, plain values and the few classes that DeepSpeed puts there.

    Args:
        mapped: leave the tensors on the disk until they are read.
    """
    with torch.serialization.safe_globals(_PLAIN):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)


def _describe(error: Exception, step: int, store: CheckpointStore) -> str:
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    text = str(error if cause is None else cause).strip().splitlines() or [type(error).__name__]
    reason = (cause.strerror if cause is not None else None) or text[0]
    try:
        free = f"{shutil.disk_usage(store.disk).free / 2**30:.1f} GiB free at {store.disk}"
    except OSError:
        free = f"the folder {store.disk} cannot be read"
    return f"the checkpoint of step {step} could not be written to {store.address}: {reason} ({free})"
