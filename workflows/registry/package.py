"""A version's files on this machine: read in place where they lie on a disk that is seen from here, else downloaded
once to `models/` in the storage folder, whole or not at all."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from workflows.errors import WorkflowError
from workflows.registry.errors import RegistryUnreachable, reachable

KEPT = 3  # downloaded versions of one model; the least recently used beyond them are deleted


def fetch(client: MlflowClient, version: ModelVersion, storage: Path) -> Path:
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # replicas on one machine: one downloads, the others find it there
        if folder.is_dir():
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as temporary:
            try:
                found = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=temporary)
            except (MlflowException, OSError) as error:
                raise RegistryUnreachable(f"{label} could not be downloaded: {str(error)[:300]}") from error
            os.replace(found, folder)


def _delete_unused(used: Path, name: str) -> None:
    """Models are read into memory, so a folder is needed only while it is loaded, and to start again from: those that
    serving noted (workflows/serve/follow.py) stay."""
    noted = " ".join(file.read_text() for file in used.parent.parent.glob("serving/*.json"))
    folders = [f for f in used.parent.glob(f"{name}-*-??????????") if f.is_dir() and f.name not in noted]
    folders = [f for f in folders if f.name.rsplit("-", 2)[0] == name]
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)[KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
        (folder.parent / f".{folder.name}.lock").unlink(missing_ok=True)
