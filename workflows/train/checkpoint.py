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

from pipelines import storage
from pipelines.storage import join, shown
from workflows.storage.layout import write_atomic
from workflows.storage.remote import cached, fetch_once, is_remote, list_folders, send

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


def open_store(place: str) -> "FolderStore | ObjectStore":
    """The checkpoints at a path or URI."""
    return ObjectStore(place) if is_remote(place) else FolderStore(Path(place))


class FolderStore:
    """Checkpoints in a folder that every node sees."""

    poll = 0.05
    """Seconds between looks for the other ranks' listings."""

    def __init__(self, root: Path):
        self._root = root
        self.address, self.disk = str(root), root

    def staging(self, step: int, attempt: str) -> Path:
        """Where a rank writes its files."""
        return partial_folder(self._root, step, attempt)

    def hand_over(self, staging: Path, rank: int, names: list[str]) -> None:
        """Say that a rank has written its files; the last thing it does."""
        list_files(staging, rank, names)

    def all_listed(self, staging: Path, workers: int) -> bool:
        """Whether every rank has said so."""
        return all_listed(staging, workers)

    def complete(self, staging: Path, checkpoint: Checkpoint, keep: int) -> None:
        """Make what all ranks have handed over the checkpoint that `checkpoint` describes (all but its files and
        folder), then drop the oldest."""
        target = replace(checkpoint, folder=self._root / folder_name(checkpoint.step))
        complete(staging, target, keep)

    def discard(self, staging: Path) -> None:
        """Remove what was written of a checkpoint that will not be."""
        shutil.rmtree(staging, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The usable checkpoint with the most steps, if any."""
        return newest(self._root)

    def sweep(self) -> None:
        """Remove what an attempt before this one left half written, and damaged ones; rank 0 does."""
        self._root.mkdir(parents=True, exist_ok=True)
        sweep(self._root)

    def sweep_here(self) -> None:
        """Remove such things of this machine's; every rank does."""

    def bring(self, found: Checkpoint, rank: int, everything: bool) -> Checkpoint:
        """The checkpoint with the files that a rank needs, or all, in its folder on this machine."""
        return found

    def release(self, found: Checkpoint) -> None:
        """Its files are not needed here any more."""


class ObjectStore:
    """Checkpoints in an object store. The methods are those of FolderStore."""

    poll = 1.0

    def __init__(self, uri: str):
        self._uri, self._local = uri, cached(uri)
        self.address, self.disk = shown(uri).partition("?")[0], self._local

    def staging(self, step: int, attempt: str) -> Path:
        return self._local / f"{folder_name(step)}.{attempt}"

    def hand_over(self, staging: Path, rank: int, names: list[str]) -> None:
        sizes = {name: (staging / name).stat().st_size for name in names}
        for name in names:
            send(staging / name, join(self._uri, staging.name, name))
        storage.write_atomic(join(self._uri, staging.name, _listing_name(rank)), json.dumps(sizes).encode())
        for name in names:
            (staging / name).unlink()

    def all_listed(self, staging: Path, workers: int) -> bool:
        there = storage.list_names(join(self._uri, staging.name))
        return {_listing_name(rank) for rank in range(workers)} <= set(there)

    def complete(self, staging: Path, checkpoint: Checkpoint, keep: int) -> None:
        files: dict[str, int] = {}
        for rank in range(checkpoint.workers):
            files |= json.loads(storage.read_bytes(join(self._uri, staging.name, _listing_name(rank))))
        text = described(replace(checkpoint, files=files))
        storage.write_atomic(join(self._uri, staging.name, COMPLETE), text.encode())
        shutil.rmtree(staging, ignore_errors=True)
        for old in self._whole()[:-keep]:
            self._remove(old.folder.name)

    def discard(self, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        self._remove(staging.name)

    def newest(self) -> Checkpoint | None:
        return next(reversed(self._whole()), None)

    def sweep(self) -> None:
        usable = {checkpoint.folder.name for checkpoint in self._whole()}
        for name in list_folders(self._uri):
            if name.startswith("step-") and name not in usable:
                self._remove(name)

    def sweep_here(self) -> None:
        shutil.rmtree(self._local, ignore_errors=True)

    def bring(self, found: Checkpoint, rank: int, everything: bool) -> Checkpoint:
        folder = self._local / found.folder.name
        for name, size in found.files.items():
            if everything or "pp_rank_" not in name or f"pp_rank_{rank}_" in name:  # DeepSpeed's names of shards
                fetch_once(join(self._uri, folder.name, name), folder / name, size)
        return replace(found, folder=folder)

    def release(self, found: Checkpoint) -> None:
        shutil.rmtree(found.folder, ignore_errors=True)

    def _whole(self) -> list[Checkpoint]:
        found = [self._read(name) for name in list_folders(self._uri) if name.startswith("step-")]
        return sorted((checkpoint for checkpoint in found if checkpoint), key=lambda checkpoint: checkpoint.step)

    def _read(self, name: str) -> Checkpoint | None:
        """A checkpoint as complete.json describes it, if the store still has its files with their sizes."""
        uri = join(self._uri, name)
        try:
            content = json.loads(storage.read_bytes(join(uri, COMPLETE)))
            checkpoint = Checkpoint(folder=self._local / name, address=f"{self.address}/{name}", **content)
            sizes = {file: storage.size(join(uri, file)) for file in checkpoint.files}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return None
        return checkpoint if sizes == checkpoint.files else None

    def _remove(self, name: str) -> None:
        """Its mark first, so that no half removed checkpoint looks whole."""
        storage.delete(join(self._uri, name, COMPLETE))
        storage.delete_folder(join(self._uri, name))


def _listing_name(rank: int) -> str:
    return f".rank-{rank}.json"
