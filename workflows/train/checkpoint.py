"""Checkpoints: complete or ignored, whatever was killed while they were written.

    <checkpoints>/step-00000100.<attempt>/    a file or two and a listing by every rank, then complete.json

`complete.json` names every file with its size. Rank 0 writes it when every rank has listed its files, so a folder with
it is whole; that the files still have their sizes and checksums is checked all the same before it is used. Every start
of the workers is an attempt with a name of its own, so that what a process believed dead still writes meets nobody.
Versions up to 0.1 wrote into `.step-00000100.<attempt>` and renamed it to `step-00000100`: those are found, and swept
up, too.
"""

import errno
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipelines import storage
from workflows.storage.folder import WHOLE, Folder
from workflows.storage.remote import download_once, list_folders, upload

_WHERE = ("folder", "address")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint of a stage."""

    folder: Path
    """On this machine: itself, or where a copy lies or will."""
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
    best: dict | None = None
    """What BestStep knew then, of a stage that takes its best step."""
    address: str = ""
    """What to call it where `folder` is a copy: the URI in the object store."""

    def __str__(self) -> str:
        return self.address or str(self.folder)

    @property
    def among(self) -> str:
        """What to call the folder of all checkpoints of the stage, for people."""
        return str(self).rpartition("/")[0]

    def described(self) -> str:
        """The text of its complete.json: all but where it is."""
        return json.dumps({name: value for name, value in asdict(self).items() if name not in _WHERE}, indent=1)


class CheckpointStore:
    """The checkpoints of a stage, in a folder that every node sees or in an object store.

    In a folder the ranks write where the checkpoint will be. In a store each writes to this machine's copy (`staging`)
    and uploads from there.

    Attributes:
        address: the folder, for people.
        disk: where this machine writes.
        poll: seconds between looks for the other ranks' listings.
    """

    def __init__(self, folder: Folder):
        self._folder = folder
        self.address, self.disk = folder.shown.partition("?")[0] if folder.remote else folder.shown, folder.local
        self.poll = 1.0 if folder.remote else 0.05

    def staging(self, step: int, attempt: str) -> Path:
        """Where a rank writes its files."""
        return self.disk / f"step-{step:08d}.{attempt}"

    def publish(self, staging: Path, rank: int, names: list[str]) -> None:
        """Upload a rank's files, where there is a store, and list them for the others. Call last."""
        there = self._folder / staging.name
        sizes = {name: (staging / name).stat().st_size for name in names}
        if there.remote:
            for name in names:
                upload(staging / name, (there / name).uri)
        there.write(_listing(rank), json.dumps(sizes))
        if there.remote:
            for name in names:
                (staging / name).unlink()

    def all_listed(self, staging: Path, workers: int) -> bool:
        """Whether every rank has published its files."""
        there = storage.list_names((self._folder / staging.name).uri)
        return {_listing(rank) for rank in range(workers)} <= set(there)

    def complete(self, staging: Path, checkpoint: Checkpoint, keep: int) -> None:
        """Make what all ranks have published a whole checkpoint, then drop the oldest over `keep`.

        Nothing is dropped before the new one is whole.

        Args:
            checkpoint: describes it, all but its files.
        """
        there = self._folder / staging.name
        files: dict[str, int] = {}
        for rank in range(checkpoint.workers):
            files |= json.loads(there.read(_listing(rank)))
        there.write(WHOLE, replace(checkpoint, files=files).described())
        if there.remote:
            shutil.rmtree(staging, ignore_errors=True)
        for old in self.whole()[:-keep]:
            (self._folder / old.folder.name).delete()

    def discard(self, staging: Path) -> None:
        """Delete what was written of a checkpoint that will not be complete."""
        shutil.rmtree(staging, ignore_errors=True)
        (self._folder / staging.name).delete()

    def whole(self) -> list[Checkpoint]:
        """The usable checkpoints, oldest first."""
        found = [self._read(name) for name in list_folders(self._folder.uri) if name.startswith("step-")]
        return sorted((checkpoint for checkpoint in found if checkpoint), key=lambda checkpoint: checkpoint.step)

    def newest(self) -> Checkpoint | None:
        """The usable checkpoint with the most steps, if any."""
        return next(reversed(self.whole()), None)

    def sweep(self) -> None:
        """Delete what no attempt can use: what one before this left half written, and damaged ones. Rank 0 calls it."""
        usable = {checkpoint.folder.name for checkpoint in self.whole()}
        for name in list_folders(self._folder.uri):
            if name.startswith(("step-", ".step-")) and name not in usable:
                (self._folder / name).delete()

    def sweep_copies(self) -> None:
        """Delete this machine's copies of a store; every rank calls it."""
        if self._folder.remote:
            shutil.rmtree(self.disk, ignore_errors=True)

    def fetch(self, found: Checkpoint, rank: int, everything: bool) -> str:
        """Bring the files that a rank needs, or all, to the checkpoint's folder on this machine, and read them once.

        torch writes a checksum (CRC-32) beside each tensor and does not look at it when it loads.

        Returns:
            What is wrong with one of them; "" when all are as they were written.
        """
        there = self._folder / found.folder.name
        for name, size in found.files.items():
            if everything or "pp_rank_" not in name or f"pp_rank_{rank}_" in name:  # DeepSpeed's names of shards
                if self._folder.remote:
                    download_once((there / name).uri, found.folder / name, size)
                if damage := _damage(found.folder / name):
                    return f"{name}: {damage}"
        return ""

    def reject(self, found: Checkpoint) -> None:
        """Delete a damaged checkpoint, so that an older one is the newest. Rank 0 calls it."""
        (self._folder / found.folder.name).delete()
        self.release(found)

    def release(self, found: Checkpoint) -> None:
        """Delete the copy that `fetch` made; its files are not needed any more."""
        if self._folder.remote:
            shutil.rmtree(found.folder, ignore_errors=True)

    def write_file(self, name: str, write: Callable[[Path], None]) -> None:
        """Put a file beside the checkpoints, whole or not at all.

        Args:
            write: writes it to a path of this machine.
        """
        self.disk.mkdir(parents=True, exist_ok=True)
        partial = self.disk / f".{name}.partial"
        try:
            write(partial)
            if self._folder.remote:
                upload(partial, (self._folder / name).uri)
            partial.replace(self.disk / name)
        finally:
            partial.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Put a small text beside the checkpoints, whole or not at all."""
        self._folder.write(name, text)

    def read(self, name: str) -> bytes | None:
        """What `write` put there, or None."""
        try:
            return self._folder.read(name)
        except FileNotFoundError:
            return None

    def has_file(self, name: str) -> bool:
        """Whether such a file is there."""
        return storage.size((self._folder / name).uri) is not None

    def fetch_file(self, name: str) -> Path:
        """Such a file on this machine's disk. Raises FileNotFoundError where it is not there."""
        there, local = (self._folder / name).uri, self.disk / name
        if self._folder.remote and not local.is_file():
            if (size := storage.size(there)) is None:
                raise FileNotFoundError(f"{storage.shown(there)} is not there")
            download_once(there, local, size)
        return local

    def keep_files(self, prefix: str, names: set[str]) -> None:
        """Delete the files whose names begin so, but for these."""
        for name in storage.list_names(self._folder.uri):
            if name.startswith(prefix) and name not in names:
                storage.delete((self._folder / name).uri)
                (self.disk / name).unlink(missing_ok=True)

    def _read(self, name: str) -> Checkpoint | None:
        """A checkpoint as complete.json describes it, if its files are still there with their sizes."""
        there = self._folder / name
        address = f"{self.address}/{name}" if there.remote else ""
        try:
            checkpoint = Checkpoint(folder=self.disk / name, address=address, **json.loads(there.read(WHOLE)))
            sizes = {file: storage.size((there / file).uri) for file in checkpoint.files}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return None
        return checkpoint if sizes == checkpoint.files else None


def _damage(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            record = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
        # A flipped offset leads before the beginning of the file, a flipped flag says that it is encrypted.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        return f"it is no file of torch's any more ({error})"
    return f"its record {record} is not what was written" if record else ""


def _listing(rank: int) -> str:
    return f".rank-{rank}.json"
