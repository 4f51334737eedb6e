"""Checkpoints as folders: complete or ignored, whatever was killed while they were written.

    <checkpoints>/.step-00000100.<attempt>/   being written: a file or two and a listing by every rank
    <checkpoints>/step-00000100/              whole: complete.json names every file with its size

`complete.json` is written when every rank has listed its files, and the folder gets its name after that, by a rename.
So a folder called step-* is whole; that its files still have their sizes is checked all the same before it is used.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from workflows.layout import write_atomic

COMPLETE = "complete.json"
_WHERE = ("folder", "address")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint of a stage."""

    folder: Path
    step: int
    """Optimizer steps done."""
    workers: int
    zero_stage: int
    model: str
    """Digest of the names and shapes of what trains."""
    lowest_loss: float | None
    """Lowest mean loss between two logs so far, which divergence is measured against."""
    files: dict[str, int]
    """Size in bytes by name."""
    address: str = ""
    """What to call it where `folder` is a copy: the URI in the object store."""

    def __str__(self) -> str:
        return self.address or str(self.folder)

    @property
    def among(self) -> str:
        """What to call the folder of all checkpoints of the stage, for people."""
        return str(self).rpartition("/")[0]


def folder_name(step: int) -> str:
    """Name of the folder of a whole checkpoint."""
    return f"step-{step:08d}"


def partial_folder(root: Path, step: int, attempt: str) -> Path:
    """Where an attempt writes the checkpoint of a step."""
    return root / f".{folder_name(step)}.{attempt}"


def whole_checkpoints(root: Path) -> list[Checkpoint]:
    """The usable checkpoints, oldest first."""
    found = [_read(folder) for folder in root.glob("step-*")]
    return sorted((checkpoint for checkpoint in found if checkpoint), key=lambda checkpoint: checkpoint.step)


def newest(root: Path) -> Checkpoint | None:
    """The usable checkpoint with the most steps, if any."""
    return next(reversed(whole_checkpoints(root)), None)


def _read(folder: Path) -> Checkpoint | None:
    try:
        content = json.loads((folder / COMPLETE).read_text())
        checkpoint = Checkpoint(folder=folder, **content)
        sizes = {name: (folder / name).stat().st_size for name in checkpoint.files}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return checkpoint if sizes == checkpoint.files else None


def list_files(partial: Path, rank: int, names: list[str]) -> None:
    """Say that a rank has written its files; the last thing it does."""
    write_atomic(_listing(partial, rank), json.dumps({name: (partial / name).stat().st_size for name in names}))


def all_listed(partial: Path, workers: int) -> bool:
    """Whether every rank has said so."""
    return all(_listing(partial, rank).exists() for rank in range(workers))


def complete(partial: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Make a partial folder the checkpoint that `checkpoint` describes (all but its files), then drop the oldest.

    Nothing is dropped before the new one is whole. If a process that was believed dead has made the same checkpoint in
    the meantime, that one stays: its content is the same.
    """
    files: dict[str, int] = {}
    for rank in range(checkpoint.workers):
        files |= json.loads(_listing(partial, rank).read_text())
    write_atomic(partial / COMPLETE, described(replace(checkpoint, files=files)))
    if _read(checkpoint.folder) is None:
        shutil.rmtree(checkpoint.folder, ignore_errors=True)
        partial.rename(checkpoint.folder)
    else:
        shutil.rmtree(partial)
    for old in whole_checkpoints(checkpoint.folder.parent)[:-keep]:
        _remove(old.folder)


def described(checkpoint: Checkpoint) -> str:
    """The text of its complete.json: all but where it is."""
    return json.dumps({name: value for name, value in asdict(checkpoint).items() if name not in _WHERE}, indent=1)


def sweep(root: Path) -> None:
    """Remove what no attempt can use: folders that an attempt before this one left half written, or damaged ones."""
    usable = {checkpoint.folder for checkpoint in whole_checkpoints(root)}
    for folder in [*root.glob(".step-*"), *root.glob("step-*")]:
        if folder not in usable:
            shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Take the name away first, so that no half removed folder is left under it."""
    hidden = folder.with_name(f".{folder.name}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _listing(partial: Path, rank: int) -> Path:
    return partial / f".rank-{rank}.json"
