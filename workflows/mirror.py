"""Small files of a run that grow while it works, kept in the object store too: its journal."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines import storage
from workflows.storage import is_remote, place

_SECONDS = 30.0


@contextmanager
def mirrored(folder: Path, names: tuple[str, ...], note: Callable[[str], None]) -> Iterator[None]:
    """Fetch files of a mounted folder before the block; send them while it runs, every half minute, and after it.

    Of a file that is here and in the store, the one here stays if it begins with the other. A machine that goes on
    after another was lost misses half a minute at most. For a folder that is no store's nothing is done.

    Args:
        note: told when the store does not take them.
    """
    places = {folder / name: place(folder / name) for name in names}
    if not all(is_remote(uri) for uri in places.values()):
        yield
        return
    mirror = _Mirror(places, note)
    mirror.start()
    try:
        yield
    finally:
        mirror.over.set()
        mirror.join()
        mirror.send()


class _Mirror(threading.Thread):
    def __init__(self, places: dict[Path, str], note: Callable[[str], None]):
        super().__init__(name="mirror", daemon=True)
        self.over = threading.Event()
        self._places, self._note, self._away = places, note, False
        self._sent = {file: _fetch_longer(file, uri) for file, uri in places.items()}

    def run(self) -> None:
        while not self.over.wait(_SECONDS):
            self.send()

    def send(self) -> None:
        """Send what has changed."""
        try:
            for file, uri in self._places.items():
                content = file.read_bytes() if file.exists() else b""
                if content != self._sent[file]:
                    storage.write_atomic(uri, content)
                    self._sent[file] = content
            self._away = False
        except OSError as error:  # training does not end for the sake of its log
            if not self._away:
                self._note(f"the store does not take the run's journal, which is sent later: {error}")
            self._away = True


def _fetch_longer(file: Path, uri: str) -> bytes:
    """What the store has; written to `file` unless that begins with it."""
    try:
        there = storage.read_bytes(uri)
    except FileNotFoundError:
        return b""
    here = file.read_bytes() if file.exists() else b""
    if not here.startswith(there):
        storage.write_atomic(str(file), there)
    return there
