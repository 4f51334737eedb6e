"""A replica and its alias: which version it starts with, and how it goes on from there.

A replica starts with the version that the alias names. When that one is refused, or the registry does not answer, it
starts with the version that was taken last (a file in the storage folder): a killed replica comes back, and a new one
joins, whatever was promoted meanwhile.
"""

import json
import logging
import os
import socket
import time
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from workflows.errors import WorkflowError
from workflows.layout import write_atomic
from workflows.registry import PREFIX, Reference, ResolvedModel, get_version, holder, parse_reference, resolve_model
from workflows.registry.errors import RegistryUnreachable
from workflows.registry.find import bring
from workflows.serve.limits import Limits
from workflows.serve.loader import load
from workflows.serve.service import Served, Service
from workflows.serve.swap import Refusal, Refused, SwapOptions, Swapper
from workflows.serve.watcher import AliasWatcher
from workflows.tracking import connect

logger = logging.getLogger(__name__)
_REFUSED = "mlmamba.refused"


class Follower:
    """Loads the first model of a replica and, for an alias, keeps it on the alias's version.

    Args:
        reference: models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder.
        storage: the storage folder.
        service: what the replica serves; has its model when this returns.
        replica: name of the replica, for what it reports.

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
    ):
        self._service, self._options, self._storage = service, options, storage
        self._limits, self._threads = limits, threads
        self._who = f"{replica} on {socket.gethostname()}"
        self.watcher: AliasWatcher | None = None
        wanted = parse_reference(reference) if reference.startswith(PREFIX) else None
        if wanted is None or wanted.alias is None:
            service.served = self._load(resolve_model(reference, storage))
            return
        self._wanted = wanted
        self._client: MlflowClient = connect(storage)
        self._last = storage / "serving" / f"{wanted}.json"
        self._swapper = Swapper(service, options, self._load_version, self._look_again, self._taken, self._refused)
        self._start()
        self.watcher = AliasWatcher(
            self._look, self._swapper.offer, options.poll_seconds, options.jitter, self._last.with_suffix(".look")
        )
        self.watcher.start()

    def as_dict(self) -> dict:
        """What is served and what is wanted, as plain data."""
        replica = {"replica": self._who, "pid": os.getpid()}
        if self.watcher is None:
            served = self._service.served
            return {**replica, "follows": None, "serving": served and served.source.label}
        return {**replica, "follows": str(self._wanted), **self._swapper.as_dict(), **self.watcher.as_dict()}

    def close(self) -> None:
        """Follow no more."""
        if self.watcher is not None:
            self.watcher.stop()

    def _start(self) -> None:
        version = None
        try:
            found = get_version(self._client, self._wanted)
            version = str(found.version)
            self._service.served = self._load(bring(self._client, found, self._storage))
        except WorkflowError as error:
            source = self._last_taken()
            if source is None or source.version == version:
                raise
            logger.error("%s cannot be served, %s is: %s", self._wanted, source.label, error)
            self._service.served = self._load(source)
            if version is not None and not isinstance(error, RegistryUnreachable):
                self._swapper.refuse(version, str(error))
        else:
            self._taken(self._service.served)

    def _load(self, source: ResolvedModel, quiet: bool = False) -> Served:
        return load(source, self._limits, self._threads, self._options.same_answer, quiet)

    def _look(self) -> str | None:
        return holder(self._client, self._wanted.name, self._wanted.alias)

    def _look_again(self) -> str | None:
        try:
            return self._look()
        except WorkflowError:
            return None

    def _load_version(self, version: str) -> Served:
        try:
            found = get_version(self._client, Reference(self._wanted.name, version))
            source = bring(self._client, found, self._storage)
        except RegistryUnreachable:
            raise
        except WorkflowError as error:
            raise Refused(str(error)) from error
        return self._load(source, quiet=True)

    def _last_taken(self) -> ResolvedModel | None:
        try:
            content = json.loads(self._last.read_text())
            example = content["example"] and Path(content["example"])
            source = ResolvedModel(
                Path(content["folder"]), self._wanted.name, content["version"], content["run_id"], example
            )
        except (OSError, ValueError, KeyError):
            return None
        return source if source.folder.is_dir() else None

    def _taken(self, served: Served) -> None:
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
            pass  # the tag is for people; it tells when it was written

    def _refused(self, refusal: Refusal) -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(refusal.when))
        record = {"who": self._who, "when": when, "why": refusal.reason, "tries": refusal.tries}
        try:
            self._client.set_model_version_tag(self._wanted.name, refusal.version, _REFUSED, json.dumps(record))
        except MlflowException as error:
            logger.warning("the refusal could not be written to the registry: %s", str(error).splitlines()[0][:200])
