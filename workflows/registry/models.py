"""Finding versions: references, the version behind an alias, listings. Errors say what there is instead."""

import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired  # pydantic reads no other before Python 3.12
from urllib.parse import unquote, urlparse

import mlflow
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient
from typing_extensions import TypedDict

from pipelines.storage import shown
from workflows.errors import UsageError, WorkflowError
from workflows.registry.history import UnreadableTag, history, read_tag
from workflows.storage.folder import Folder
from workflows.storage.remote import is_remote, machine_lock
from workflows.tracking.tracker import connect

PREFIX = "models:/"


@dataclass(frozen=True)
class Reference:
    """What a person writes for a registered model: NAME, NAME/VERSION or NAME@ALIAS."""

    name: str
    version: str | None = None
    alias: str | None = None

    def __str__(self) -> str:
        return self.name + (f"@{self.alias}" if self.alias else f"/{self.version}" if self.version else "")


@dataclass(frozen=True)
class ResolvedModel:
    """A model folder on this machine, and where it came from."""

    folder: Path
    name: str | None = None
    version: str | None = None
    run_id: str | None = None
    example: Path | None = None
    """Folder with an image, a question and the answer that the evaluation saw (register.py), where there is one."""

    @property
    def label(self) -> str:
        """What a person calls it: name/version, or the folder."""
        return f"{self.name}/{self.version}" if self.name else self.folder.name


def parse_reference(text: str) -> Reference:
    """NAME, NAME/VERSION or NAME@ALIAS, with or without models:/ before it. Raises UsageError.

    Recipes name models without spaces; others may have registered names with some inside, which MLflow allows.
    """
    body = text.removeprefix(PREFIX)
    match = re.fullmatch(r"([^/@:\s](?:[^/@:]*[^/@:\s])?)(?:/(\d+)|@([A-Za-z0-9_-]+))?", body, re.ASCII)
    if match and not match[1].isprintable():
        match = None
    if not match:
        raise UsageError(f"{text!r} is not a registered model: write NAME, NAME/VERSION (a number) or NAME@ALIAS")
    return Reference(*match.groups())


def resolve_model(reference: str, storage: Path) -> ResolvedModel:
    """Find a model by folder, by the URI of one that a workflow left in an object store, or by models:/name@alias (or
    models:/name/version), and fetch its folder to this machine.

    Raises:
        WorkflowError: there is no such folder, model, version or alias.
    """
    if is_remote(reference):
        try:
            return ResolvedModel(Folder(reference).fetch())
        except (OSError, ValueError) as error:
            raise WorkflowError(f"{shown(reference)} is not a model folder that can be read: {error}") from error
    if not reference.startswith(PREFIX):
        folder = Path(reference)
        if not (folder / "config.json").is_file():
            raise WorkflowError(f"{reference} is neither a model folder (no config.json) nor models:/NAME@ALIAS")
        return ResolvedModel(folder)
    client = connect(storage)
    return fetch_version(client, get_version(client, reference), storage)


def fetch_version(client: MlflowClient, version: ModelVersion, storage: Path) -> ResolvedModel:
    """A version's folder on this machine, downloaded to the storage folder unless it lies on a disk seen from here.

    Raises:
        WorkflowError: it cannot be fetched, or is not one of ours.
    """
    folder, example = open_package(fetch_package(client, version, storage))
    return ResolvedModel(folder, version.name, str(version.version), version.run_id, example)


def get_version(client: MlflowClient, reference: str | Reference) -> ModelVersion:
    """The version of NAME@ALIAS or NAME/VERSION.

    Raises:
        UsageError: the reference names no version.
        WorkflowError: there is none, or the registry does not answer.
    """
    wanted = parse_reference(reference) if isinstance(reference, str) else reference
    if wanted.version is None and wanted.alias is None:
        raise UsageError(f"{wanted}: say which version, as {wanted}/VERSION or {wanted}@ALIAS")
    model = get_model(client, wanted.name)
    number = model.aliases.get(wanted.alias) if wanted.alias else wanted.version
    if number is None:
        known = ", ".join(f"@{alias} (version {version})" for alias, version in sorted(model.aliases.items()))
        raise WorkflowError(f"model {wanted.name} has no alias @{wanted.alias}; it has {known or 'none'}")
    try:
        with reachable():
            return client.get_model_version(wanted.name, str(number))
    except MlflowException as error:
        known = ", ".join(str(version.version) for version in versions_of(client, wanted.name))
        raise WorkflowError(f"model {wanted.name} has no version {number}; it has {known or 'none'}") from error


def get_model(client: MlflowClient, name: str) -> RegisteredModel:
    """A registered model with its aliases and tags. Raises WorkflowError naming those that exist."""
    try:
        with reachable():
            return client.get_registered_model(name)
    except MlflowException as error:
        known = ", ".join(model.name for model in all_models(client))
        raise WorkflowError(
            f"there is no model {name} in the registry at {registry_address()}; registered: {known or 'none'}. "
            "`mlmamba models list` shows versions and aliases"
        ) from error


def holder(client: MlflowClient, name: str, alias: str) -> str | None:
    """Version that the alias names; None when no version holds it or there is no such model. Raises WorkflowError."""
    try:
        with reachable():
            version = client.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if absent(error):
            return None
        raise
    return None if version is None else str(version)


def all_models(client: MlflowClient) -> list[RegisteredModel]:
    """Every registered model."""
    return _pages(lambda token: client.search_registered_models(page_token=token))


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Every version of a model, oldest first; none when there is no such model."""
    quote = '"' if "'" in name else "'"
    if quote in name:
        raise WorkflowError(f"model {name}: MLflow cannot search a name with both kinds of quotes; rename it there")
    found = _pages(lambda token: client.search_model_versions(f"name = {quote}{name}{quote}", page_token=token))
    return sorted(found, key=lambda version: int(version.version))


def list_models(client: MlflowClient) -> list[dict]:
    """Every registered version: name, version, aliases, scores, what made it."""
    return [row for model in all_models(client) for row in rows_of(client, model.name)]


def show_model(client: MlflowClient, name: str) -> dict:
    """One model: its versions, its aliases, and how they moved (oldest first)."""
    model = get_model(client, name)
    return {
        "name": name,
        "aliases": {alias: str(version) for alias, version in model.aliases.items()},
        "versions": rows_of(client, name),
        "moves": [move.as_dict() for move in history(model.tags)],
    }


def rows_of(client: MlflowClient, name: str) -> list[dict]:
    """The versions of one model, as plain data."""
    aliases: dict[str, list[str]] = {}
    for alias, version in get_model(client, name).aliases.items():
        aliases.setdefault(str(version), []).append(alias)
    return [row(version, aliases.get(str(version.version), [])) for version in versions_of(client, name)]


def row(version: ModelVersion, aliases: list[str]) -> dict:
    """One version as plain data."""
    tags, unreadable = version.tags, []

    def read(name: str, kind, absent=None):
        try:
            return read_tag(tags, f"mlmamba.{name}", kind, absent)
        except UnreadableTag:
            unreadable.append(f"mlmamba.{name}")
            return absent

    content = {
        "name": version.name,
        "version": str(version.version),
        "aliases": sorted(aliases),
        "scores": read("scores", dict[str, float], {}),
        "gate": read("gate", dict[str, dict[str, float]]),
        "data_digest": tags.get("mlmamba.data_digest"),
        "recipe": tags.get("mlmamba.recipe"),
        "git": tags.get("mlmamba.git"),
        "run_id": version.run_id,
        "registered": version.creation_timestamp,
    }
    names = [key.removeprefix("mlmamba.") for key in tags if key.startswith("mlmamba.forced.")]
    forced = {name.removeprefix("forced."): record for name in names if (record := read(name, Forced))}
    refused = read("refused", Refused)
    found = {"forced": forced, "refused": refused, "unreadable": unreadable}
    return content | {name: value for name, value in found.items() if value}


class Refused(TypedDict):
    """Why serving did not take a version."""

    when: str
    who: str
    why: str
    tries: NotRequired[int]


class Forced(Refused):
    """Why an alias was moved although the gate failed."""

    gate_failures: list[str]


def _pages(fetch_page: Callable) -> list:
    found, token = [], None
    with reachable():
        while True:
            page = fetch_page(token)
            found += page
            token = page.token
            if not token:
                return found


KEPT = 3  # downloaded versions of one model; the least recently used beyond them are deleted


def fetch_package(client: MlflowClient, version: ModelVersion, storage: Path) -> Path:
    """Folder of the version's MLflow package.

    Raises:
        WorkflowError: it cannot be downloaded.
    """
    label = f"{version.name}/{version.version}"
    try:
        with reachable():
            uri = client.get_model_version_download_uri(version.name, str(version.version))
    except MlflowException as error:
        raise WorkflowError(f"{label}: {error}") from error
    parsed = urlparse(uri)
    if parsed.scheme in ("", "file"):
        folder = Path(unquote(parsed.path))
        if not folder.is_dir():
            raise WorkflowError(f"{label}: its files are not at {folder}, where the registry says; register it again")
        return folder
    key = hashlib.sha256(uri.encode()).hexdigest()[:10]  # a number may come again in another registry
    folder = storage / "models" / f"{version.name}-{version.version}-{key}"
    if not folder.is_dir():
        _download(uri, folder, label)
    os.utime(folder)
    _delete_unused(folder, version.name)
    return folder


def open_package(package: Path) -> tuple[Path, Path | None]:
    """Model folder and example folder (or None) inside an MLflow package. Raises WorkflowError."""
    try:
        artifacts = Model.load(package).flavors["python_function"]["artifacts"]
        paths = {name: (package / item["path"]).resolve() for name, item in artifacts.items()}
        model = paths["model"]
    except (MlflowException, KeyError, TypeError, OSError) as error:
        raise WorkflowError(
            f"{package} is not a model that mlmamba registered: {type(error).__name__}: {error}"
        ) from error
    for path in paths.values():
        if not path.is_relative_to(package.resolve()):
            raise WorkflowError(f"{package}: its MLmodel names a path outside of it ({path})")
    return model, paths.get("example")


def _download(uri: str, folder: Path, label: str) -> None:
    with machine_lock(folder):  # replicas on one machine: one downloads, the others find it there
        if folder.is_dir():
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as temporary:
            try:
                found = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=temporary)
            except (MlflowException, OSError) as error:
                raise RegistryUnreachable(f"{label} could not be downloaded: {str(error)[:300]}") from error
            Folder(str(folder)).publish(Path(found))


def _delete_unused(used: Path, name: str) -> None:
    """Models are read into memory, so a folder is needed only while it is loaded, and to start again from: those that
    serving noted (workflows/serve/alias.py) stay."""
    noted = " ".join(file.read_text() for file in used.parent.parent.glob("serving/*.json"))
    folders = [f for f in used.parent.glob(f"{glob.escape(name)}-*-??????????") if f.is_dir() and f.name not in noted]
    folders = [f for f in folders if f.name.rsplit("-", 2)[0] == name]
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)[KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
        (folder.parent / f".{folder.name}.lock").unlink(missing_ok=True)


_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter: no such alias, or version "abc"


class RegistryUnreachable(WorkflowError):
    """The registry does not answer; what it holds is unknown."""


def absent(error: MlflowException) -> bool:
    """Whether the registry answered that there is no such thing."""
    return error.error_code in _ABSENT


def registry_address() -> str:
    """Where the registry is, without a password."""
    return re.sub(r"//[^/@]*@", "//", mlflow.get_registry_uri())


@contextmanager
def reachable() -> Iterator[None]:
    """Turn MLflow's failures to reach the registry into RegistryUnreachable; "no such thing" passes as it is."""
    try:
        yield
    except MlflowException as error:
        if absent(error):
            raise
        reason = re.sub(r"//[^/@\s]*@", "//", str(error)).strip().splitlines()[0][:300]
        raise RegistryUnreachable(f"the registry at {registry_address()} does not answer: {reason}") from error
