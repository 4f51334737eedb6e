"""Replacing the model of a running replica: the new one is loaded and tested beside the old, takes over between two
requests, and the old one gives the answers that it began."""

import gc
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.config import StrictModel
from workflows.errors import WorkflowError

if TYPE_CHECKING:
    from workflows.serve.service import Served, Service

logger = logging.getLogger(__name__)


class SwapOptions(StrictModel):
    """How a replica follows its alias. One that serves a fixed version or a folder has nothing to follow."""

    poll_seconds: float = Field(5, gt=0)
    """Time between two looks at the alias."""
    jitter: float = Field(0.2, ge=0, lt=1)
    """Share by which that time varies at random, so that replicas do not look all at once."""
    retry_seconds: float = Field(60, gt=0)
    """Time until a refused version is tried again; doubles with each refusal. Moving the alias tries at once."""
    retry_most_seconds: float = Field(3600, gt=0)
    """Longest time between two tries."""
    copies: int = Field(3, ge=2)
    """Most models in memory at once: the served one, one being loaded, and those that finish their last answers. With 2
    a new one is loaded only when the old one has finished."""
    same_answer: bool = False
    """Refuse a version whose answer to its stored picture is not the one that the evaluation got. Leave it off where
    serving computes on other hardware or in another precision; the difference is logged then."""


class Refused(WorkflowError):
    """A version that cannot be loaded or failed its smoke test; the message says why."""


@dataclass(frozen=True)
class Refusal:
    """A version that was not taken."""

    version: str
    reason: str
    when: float
    """Seconds since 1970."""
    tries: int
    next_try: float
    """Seconds since 1970."""


class Swapper:
    """Puts versions into service, one at a time.

    Args:
        service: what the replica serves.
        load: loads a version and tests it; raises Refused, or another WorkflowError when that could not be decided.
        wanted: asks again which version is wanted, when one has been loaded; None where that is unknown.
        on_taken: told about a version that is served from now on.
        on_refused: told about a version that was refused.
    """

    def __init__(
        self,
        service: "Service",
        options: SwapOptions,
        load: Callable[[str], "Served"],
        wanted: Callable[[], str | None] = lambda: None,
        on_taken: Callable[["Served"], None] = lambda served: None,
        on_refused: Callable[[Refusal], None] = lambda refusal: None,
    ):
        self._service, self._options, self._load, self._wanted = service, options, load, wanted
        self._on_taken, self._on_refused = on_taken, on_refused
        self._draining: list[threading.Thread] = []
        self.refusal: Refusal | None = None
        self.loading: str | None = None

    @property
    def version(self) -> str | None:
        """The version that is served."""
        served = self._service.served
        return None if served is None else served.source.version

    def offer(self, version: str) -> bool:
        """Serve a version if it is not served already and can be. Returns whether it is served now.

        Raises:
            WorkflowError: what `load` raises besides Refused; nothing has changed then.
        """
        if version == self.version:
            self.refusal = None
            return True
        if self.refusal is not None and self.refusal.version != version:
            self.refusal = None  # someone moved the alias since; the version may be tried at once when it comes back
        if self.refusal is not None and time.time() < self.refusal.next_try:
            return False
        self._make_room()
        self.loading = version
        try:
            served = self._load(version)
        except Refused as error:
            self.refuse(version, str(error))
            return False
        finally:
            self.loading = None
        if self._wanted() not in (None, version):
            logger.warning("%s was loaded, but the alias has moved on meanwhile", served.source.label)
            self._drain(served)
            return False
        before, self._service.served = self._service.served, served
        self.refusal = None
        logger.warning("%s is served now%s", served.source.label, f", after {before.source.label}" if before else "")
        if before is not None:
            self._drain(before)
        self._on_taken(served)
        return True

    def refuse(self, version: str, reason: str) -> None:
        """Note that a version cannot be served."""
        known = self.refusal if self.refusal is not None and self.refusal.version == version else None
        tries = (known.tries if known else 0) + 1
        wait = min(self._options.retry_seconds * 2 ** (tries - 1), self._options.retry_most_seconds)
        self.refusal = Refusal(version, reason, time.time(), tries, time.time() + wait)
        logger.error(
            "version %s is refused, %s stays; it is tried again in %.0f s: %s", version, self.version, wait, reason
        )
        self._on_refused(self.refusal)

    def as_dict(self) -> dict:
        """What is served, loaded and refused, as plain data."""
        refusal = None if self.refusal is None else asdict(self.refusal)
        served = self._service.served
        return {
            "serving": None if served is None else served.source.label,
            "loading": self.loading,
            "refused": refusal,
            "draining": sum(thread.is_alive() for thread in self._draining),
        }

    def wait_for_drains(self) -> None:
        """Return when every replaced model has given its last answer."""
        for thread in list(self._draining):
            thread.join()

    def _make_room(self) -> None:
        """Wait until no more models are in memory than leave room for one more."""
        while True:
            self._draining = [thread for thread in self._draining if thread.is_alive()]
            if len(self._draining) <= self._options.copies - 2:
                return
            self._draining[0].join()

    def _drain(self, served: "Served") -> None:
        thread = threading.Thread(target=_drain, args=(served,), name="drain", daemon=True)
        self._draining.append(thread)
        thread.start()


def _drain(served: "Served") -> None:
    """Let a replaced model give its last answers, then free its memory."""
    label = served.source.label
    try:
        served.engine.close()
    except Exception:
        logger.exception("%s could not be stopped", label)
        return
    del served
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    logger.warning("%s has given its last answer", label)
