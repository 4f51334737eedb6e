"""Following an alias: a thread that looks at the registry now and then and offers the version that it finds.

Polling works with every registry. A webhook (webhook.py) or a file that another replica touched only makes it look at
once. A registry that does not answer is asked less and less often, and nothing else happens: what is served stays.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from workflows.errors import WorkflowError

logger = logging.getLogger(__name__)
_LONGEST = 60.0  # seconds between two looks at a registry that does not answer
_GLANCE = 0.5  # seconds between two looks at the file that says to look at once


class AliasWatcher:
    """Looks at an alias until stopped.

    Args:
        look: the version that the alias names, None when it names none; raises WorkflowError when that is unknown.
        offer: called with the version after each look; raises WorkflowError when the registry does not answer.
        poll_seconds: time between two looks.
        jitter: share by which it varies.
        signal: a file; when it is touched the alias is looked at soon.
    """

    def __init__(
        self,
        look: Callable[[], str | None],
        offer: Callable[[str], object],
        poll_seconds: float = 5,
        jitter: float = 0.2,
        signal: Path | None = None,
    ):
        self._look, self._offer = look, offer
        self._poll_seconds, self._jitter, self._signal = poll_seconds, jitter, signal
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._seen = self._touched()
        self.wanted: str | None = None
        self.failures = 0
        self.last_answer: float | None = None
        self._thread = threading.Thread(target=self._run, name="alias-watcher", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def wake(self) -> None:
        """Look at once."""
        self._wake.set()

    def tell_others(self) -> None:
        """Touch the file, so that the other replicas look soon."""
        if self._signal is not None:
            self._signal.parent.mkdir(parents=True, exist_ok=True)
            self._signal.touch()

    def stop(self) -> None:
        """Look no more. Returns when a look or a load in progress has ended."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def as_dict(self) -> dict:
        """What is known of the alias, as plain data."""
        return {"wanted": self.wanted, "registry_failures": self.failures, "registry_answered": self.last_answer}

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wake.clear()
            try:
                self._once()
            except Exception:  # a fault here must not end the following
                self.failures += 1
                logger.exception("following the alias failed; it is tried again")
            self._wait(self.pause())

    def _once(self) -> None:
        try:
            version = self._look()
            if version is None and self.wanted is not None:
                logger.warning("no version holds the alias any more; what is served stays")
            self.wanted = version
            if version is not None:
                self._offer(version)
        except WorkflowError as error:
            self.failures += 1
            if self.failures == 1:
                logger.warning("the alias cannot be followed for now, what is served stays: %s", error)
            return
        if self.failures:
            logger.warning("the registry answers again, after %d failures", self.failures)
        self.failures, self.last_answer = 0, time.time()

    def pause(self) -> float:
        """Seconds until the next look."""
        base = self._poll_seconds
        if self.failures:
            base = max(base, min(_LONGEST, base * 2 ** min(self.failures, 10)))
        return base * random.uniform(1 - self._jitter, 1 + self._jitter)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._wake.wait(min(left, _GLANCE)):
                return
            touched = self._touched()
            if touched != self._seen:
                self._seen = touched
                return

    def _touched(self) -> int | None:
        try:
            return None if self._signal is None else os.stat(self._signal).st_mtime_ns
        except OSError:
            return None
