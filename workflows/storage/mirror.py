"""A run's journal, kept in the object store while it grows."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines import storage
from workflows.storage.folder import Folder

SECONDS = 30.0
"""Between two uploads."""


@contextmanager
def mirrored(folder: Folder, names: tuple[str, ...], note: Callable[[str], None]) -> Iterator[None]:
    """Fetch files of a folder before the block; upload them while it runs, every half minute, and after it.

    Of a file that is here and in the store, the one here stays if it begins with the other. A machine that goes on
    after another was lost misses half a minute at most. For a folder on a disk nothing is done. A thread of its own,
    because the last entries must reach the store also when no more of them come.

    Args:
        note: told when the store does not take them.
    """
    if not folder.remote:
        yield
        return
    sent = {name: _fetch_longer(folder, name) for name in names}
    over, away = threading.Event(), False

    def upload_changed() -> None:
        nonlocal away
        try:
            for name in names:
                file = folder.local / name
                content = file.read_bytes() if file.exists() else b""
                if content != sent[name]:
                    folder.write(name, content)
                    sent[name] = content
            away = False
        except OSError as error:  # training does not end for the sake of its log
            if not away:
                note(f"the store does not take the run's journal, which is sent later: {error}")
            away = True

    def work() -> None:
        while not over.wait(SECONDS):
            upload_changed()

    thread = threading.Thread(target=work, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        upload_changed()


def _fetch_longer(folder: Folder, name: str) -> bytes:
    """What the store has of a file; written to the copy unless that begins with it."""
    try:
        there = folder.read(name)
    except FileNotFoundError:
        return b""
    file = folder.local / name
    here = file.read_bytes() if file.exists() else b""
    if not here.startswith(there):
        storage.write_atomic(file, there)
    return there
