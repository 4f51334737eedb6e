"""Comparing a shard with its sha256 before training reads it: each one once on each machine.

A bit that a disk or a copy has flipped would otherwise be trained on without a word. Several processes of one machine
share the work: the first that needs a shard checks it while the others wait, and a mark in the machine's temporary
folder says so to those that come later, for as long as the file is not touched.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

from pyarrow import fs

from pipelines import storage
from pipelines.finished import wrong_size
from pipelines.manifest import ShardInfo


class ShardDamaged(ValueError):
    """A shard is not what its manifest says; the message says what to do."""


class ShardCheck:
    """The check of one data set's shards. May be used in several threads at once.

    Args:
        uri: folder of the data set. Only shards on a disk are checked: an object store compares checksums itself, and
            rows are read from it one by one.
    """

    def __init__(self, uri: str):
        self._uri = uri
        self.possible = isinstance(storage.open_fs(uri)[0], fs.LocalFileSystem)

    def check(self, shard: ShardInfo) -> None:
        """Compare a shard with its manifest unless that was done on this machine. Raises ShardDamaged."""
        if not self.possible:
            return
        _, path = storage.open_fs(storage.join(self._uri, shard.path))
        try:
            status = os.stat(path)
        except FileNotFoundError:
            raise ShardDamaged(self._message(shard, f"{shard.path} is missing")) from None
        state = [path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, shard.sha256]
        seen = json.dumps(state)
        with _mark(path) as mark:
            if mark and mark.read() == seen:
                return
            size, sha256 = storage.checksum(path)
            problem = wrong_size(shard, size)
            if not problem and sha256 != shard.sha256:
                problem = f"{shard.path} has other content: its sha256 is {sha256}, the manifest says {shard.sha256}"
            if problem:
                raise ShardDamaged(self._message(shard, problem))
            if mark:
                mark.seek(0)
                mark.truncate()
                mark.write(seen)

    def _message(self, shard: ShardInfo, problem: str) -> str:
        file = storage.shown(storage.join(self._uri, shard.path))
        return f"{problem}. Put a good copy there, or delete {file} and run again: the data set is then made anew"


def _mark(path: str):
    """The mark of a file, open and locked against other processes and threads; None where none can be made."""
    folder = Path(tempfile.gettempdir()) / f"mlmamba-{os.getuid()}" / "checked"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mark = open(folder / hashlib.sha256(path.encode()).hexdigest()[:32], "a+")  # noqa: SIM115 - the caller closes it
    except OSError:  # no room, or not ours: then each process checks for itself
        return nullcontext()
    fcntl.flock(mark, fcntl.LOCK_EX)
    mark.seek(0)
    return mark
