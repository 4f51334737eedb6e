"""A replica follows its alias: it starts with the alias's version, and changes to another when the alias moves.

`Follower` decides what the replica serves; its `AliasWatcher` is the thread that asks the registry. When the alias's
version is refused, or the registry does not answer at the start, the replica serves the version that was served last (a
file in the storage folder), so that it comes up whatever was promoted meanwhile.
"""

import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.storage import write_atomic
from workflows.errors import WorkflowError
from workflows.registry import PREFIX, Reference, ResolvedModel, get_version, holder, parse_reference, resolve_model
from workflows.registry.models import RegistryUnreachable, fetch_version
from workflows.serve.options import Limits
from workflows.serve.service import Served, Service
from workflows.serve.swap import Refusal, Refused, SwapOptions, Swapper, load
from workflows.tracking.tracker import connect

logger = logging.getLogger(__name__)
_REFUSED = "mlmamba.refused"  # tag of a version that a replica refused
_LONGEST_PAUSE = 60.0  # seconds between two questions to a registry that does not answer
_SIGNAL_SECONDS = 0.5  # between two looks at the file that asks to look at once


class Follower:
    """Load the first model of a replica and, for an alias, keep the replica on the alias's version.

    Args:
        reference: models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder.
        storage: the storage folder.
        service: gets the model; it has one when this returns.
        replica: name of the replica, for tags and reports.
        precision, exact: as `load_model` takes them.

    Raises:
        WorkflowError: there is no model that can be served.
    """

    def __init__(
        self,
        reference: str,
        storage: Path,
        service: Service,
        options: SwapOptions,
        limits: Limits,
        threads: int | None,
        replica: str = "replica",
        precision: str = "auto",
        exact: bool = False,
    ):
        self._service, self._options, self._storage = service, options, storage
        self._limits, self._threads = limits, threads
        self._precision, self._exact = precision, exact
        self._who = f"{replica} on {socket.gethostname()}"
        self.watcher: AliasWatcher | None = None
        wanted = parse_reference(reference) if reference.startswith(PREFIX) else None
        if wanted is None or wanted.alias is None:
            service.served = self._load(resolve_model(reference, storage))
            return
        self._wanted = wanted
        self._client: MlflowClient = connect(storage)
        self._last = storage / "serving" / f"{wanted}.json"
        self._swapper = Swapper(
            service, options, self._load_version, self._alias_or_none, self._note_served, self._note_refused
        )
        self._start()
        self.watcher = AliasWatcher(
            self._look, self._swapper.offer, options.poll_seconds, options.jitter, self._last.with_suffix(".look")
        )
        self.watcher.start()

    def as_dict(self) -> dict:
        """Report what is served, which version the alias names and what was refused, as plain data."""
        replica = {"replica": self._who, "pid": os.getpid()}
        if self.watcher is None:
            served = self._service.served
            return {**replica, "follows": None, "serving": served and served.source.label}
        return {**replica, "follows": str(self._wanted), **self._swapper.as_dict(), **self.watcher.as_dict()}

    def close(self) -> None:
        """Stop following the alias."""
        if self.watcher is not None:
            self.watcher.stop()

    def _start(self) -> None:
        """Serve the version that the alias names, else the one that was served last."""
        version = None
        try:
            found = get_version(self._client, self._wanted)
            version = str(found.version)
            self._service.served = self._load(fetch_version(self._client, found, self._storage))
        except WorkflowError as error:
            source = self._last_served()
            if source is None or source.version == version:
                raise
            logger.error("%s cannot be served, %s is: %s", self._wanted, source.label, error)
            self._service.served = self._load(source)
            if version is not None and not isinstance(error, RegistryUnreachable):
                self._swapper.refuse(version, str(error))
        else:
            self._note_served(self._service.served)

    def _load(self, source: ResolvedModel, quiet: bool = False) -> Served:
        same = self._options.same_answer
        return load(source, self._limits, self._threads, same, quiet, self._precision, self._exact)

    def _look(self) -> str | None:
        return holder(self._client, self._wanted.name, self._wanted.alias)

    def _alias_or_none(self) -> str | None:
        try:
            return self._look()
        except WorkflowError:
            return None

    def _load_version(self, version: str) -> Served:
        try:
            found = get_version(self._client, Reference(self._wanted.name, version))
            source = fetch_version(self._client, found, self._storage)
        except RegistryUnreachable:
            raise
        except WorkflowError as error:
            raise Refused(str(error)) from error
        return self._load(source, quiet=True)

    def _last_served(self) -> ResolvedModel | None:
        """The version that was served last, if its folder is still there."""
        try:
            content = json.loads(self._last.read_text())
            example = content["example"] and Path(content["example"])
            source = ResolvedModel(
                Path(content["folder"]), self._wanted.name, content["version"], content["run_id"], example
            )
        except (OSError, ValueError, KeyError):
            return None
        return source if source.folder.is_dir() else None

    def _note_served(self, served: Served) -> None:
        """Write down what is served, for the next start, and delete this replica's own refusal of it."""
        source = served.source
        example = source.example and str(source.example)
        content = {"version": source.version, "run_id": source.run_id, "folder": str(source.folder), "example": example}
        try:
            write_atomic(self._last, json.dumps(content))
        except OSError as error:  # a full disk must not stop serving
            logger.warning("%s could not be written: %s", self._last, error)
        try:
            tags = self._client.get_model_version(source.name, source.version).tags
            if json.loads(tags.get(_REFUSED, "{}")).get("who") == self._who:
                self._client.delete_model_version_tag(source.name, source.version, _REFUSED)
        except (MlflowException, ValueError):
            pass  # the tag only informs people, and it holds its own date

    def _note_refused(self, refusal: Refusal) -> None:
        """Write a refusal to the registry, as a tag of the version."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(refusal.when))
        record = {"who": self._who, "when": when, "why": refusal.reason, "tries": refusal.tries}
        try:
            self._client.set_model_version_tag(self._wanted.name, refusal.version, _REFUSED, json.dumps(record))
        except MlflowException as error:
            logger.warning("the refusal could not be written to the registry: %s", str(error).splitlines()[0][:200])


class AliasWatcher:
    """A thread that asks which version an alias names, until stopped.

    Args:
        look: returns the version that the alias names, None for none; raises WorkflowError when the registry does not
            answer.
        offer: called with the version after each look; raises WorkflowError when the registry does not answer.
        poll_seconds: time between two looks.
        jitter: share by which that time varies at random.
        signal: a file; touching it makes the watcher look soon.
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
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Look at once."""
        self._wake.set()

    def tell_others(self) -> None:
        """Touch the signal file, so that the other replicas look soon."""
        if self._signal is not None:
            self._signal.parent.mkdir(parents=True, exist_ok=True)
            self._signal.touch()

    def stop(self) -> None:
        """Stop the thread. Returns when a look or a load in progress has ended."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def as_dict(self) -> dict:
        """Report the alias's version and the registry's failures, as plain data."""
        return {"wanted": self.wanted, "registry_failures": self.failures, "registry_answered": self.last_answer}

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wake.clear()
            try:
                self._once()
            except Exception:  # a fault here must not end the thread
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
        """Seconds until the next look: more after each failure in a row, up to a minute."""
        base = self._poll_seconds
        if self.failures:
            base = max(base, min(_LONGEST_PAUSE, base * 2 ** min(self.failures, 10)))
        return base * random.uniform(1 - self._jitter, 1 + self._jitter)

    def _wait(self, seconds: float) -> None:
        """Wait, but no longer than until `wake` is called or the signal file is touched."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._wake.wait(min(left, _SIGNAL_SECONDS)):
                return
            touched = self._touched()
            if touched != self._seen:
                self._seen = touched
                return

    def _touched(self) -> int | None:
        """Time of change of the signal file, in nanoseconds; None when there is none."""
        try:
            return None if self._signal is None else os.stat(self._signal).st_mtime_ns
        except OSError:
            return None
