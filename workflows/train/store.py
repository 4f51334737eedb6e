"""Where a stage's checkpoints are: a folder that every node sees, or an object store.

Both have the same methods. In a folder a checkpoint is written beside its place and renamed when every rank has listed
its files (checkpoint.py). An object store has no rename; there every attempt has a folder of its own name:

    <checkpoints>/step-00000100.<attempt>/     the ranks' files and listings, and complete.json last

Ranks write to a folder of their machine first and upload from there, in the thread that writes, beside the training.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from pipelines import storage
from pipelines.storage import join, shown
from workflows.storage import cached, fetch_once, is_remote, list_folders, send
from workflows.train import checkpoint as folders
from workflows.train.checkpoint import COMPLETE, Checkpoint, described, folder_name


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
        return folders.partial_folder(self._root, step, attempt)

    def hand_over(self, staging: Path, rank: int, names: list[str]) -> None:
        """Say that a rank has written its files; the last thing it does."""
        folders.list_files(staging, rank, names)

    def all_listed(self, staging: Path, workers: int) -> bool:
        """Whether every rank has said so."""
        return folders.all_listed(staging, workers)

    def complete(self, staging: Path, checkpoint: Checkpoint, keep: int) -> None:
        """Make what all ranks have handed over the checkpoint that `checkpoint` describes (all but its files and
        folder), then drop the oldest."""
        target = replace(checkpoint, folder=self._root / folder_name(checkpoint.step))
        folders.complete(staging, target, keep)

    def discard(self, staging: Path) -> None:
        """Remove what was written of a checkpoint that will not be."""
        shutil.rmtree(staging, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The usable checkpoint with the most steps, if any."""
        return folders.newest(self._root)

    def sweep(self) -> None:
        """Remove what an attempt before this one left half written, and damaged ones; rank 0 does."""
        self._root.mkdir(parents=True, exist_ok=True)
        folders.sweep(self._root)

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
        storage.write_atomic(join(self._uri, staging.name, _listing(rank)), json.dumps(sizes).encode())
        for name in names:
            (staging / name).unlink()

    def all_listed(self, staging: Path, workers: int) -> bool:
        there = storage.list_names(join(self._uri, staging.name))
        return {_listing(rank) for rank in range(workers)} <= set(there)

    def complete(self, staging: Path, checkpoint: Checkpoint, keep: int) -> None:
        files: dict[str, int] = {}
        for rank in range(checkpoint.workers):
            files |= json.loads(storage.read_bytes(join(self._uri, staging.name, _listing(rank))))
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


def _listing(rank: int) -> str:
    return f".rank-{rank}.json"
