"""Where things lie under the one storage folder.

    data/<name>-<digest>/     shards and manifest; shared by every recipe with the same data part
    runs/<name>-<digest>/     one folder per recipe: initial model, stages, checkpoints, evaluation
    mlflow.db, mlflow/        tracking database and artifacts

Digests come from the parts of the recipe that decide the content, so changing a recipe starts beside the old work.
In an object store the same lies under its URI, but for MLflow's, which needs a server then; the paths are those of this
machine's copies (workflows/storage/remote.py).
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import DataConfig, data_identity
from pipelines.identity import Decides, digest, identity
from pipelines.storage import shown
from workflows.errors import UsageError
from workflows.recipe.schema import Recipe
from workflows.storage.remote import is_remote, mount


@dataclass(frozen=True)
class Layout:
    """Folders of one recipe under one storage folder."""

    storage: Path
    data: dict[str, Path]
    """Data set folder by stage; stages on the same data share one."""
    run: Path

    def stage(self, name: str) -> Path:
        """Folder of a finished stage's model."""
        return self.run / "stages" / name

    @property
    def initial(self) -> Path:
        """Model put together from its parts, before any training."""
        return self.run / "initial"

    @property
    def checkpoints(self) -> Path:
        """Ray Train's storage: checkpoints of unfinished stages."""
        return self.run / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.run / "evaluation"


def open_storage(storage: str, remote: bool = False) -> Path:
    """Absolute path of the storage folder, made if need be.

    Args:
        storage: a folder, or the URI of an object store.
        remote: the caller can work with an object store; it gets the folder of this machine's copies.

    Raises:
        UsageError: it cannot be written, or is an object store and the caller cannot work with that.
    """
    if is_remote(storage):
        return _open_store(storage, remote)
    path = Path(storage.removeprefix("file://")).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--storage {storage}: cannot write to {path} ({reason}); choose another folder") from error
    return path


def _open_store(uri: str, supported: bool) -> Path:
    if not supported:
        raise UsageError(
            f"--storage {shown(uri)}: run, train, prepare and submit keep their work in object stores; this command "
            "wants a folder for its own files (the registry is the one in MLFLOW_TRACKING_URI, whatever the folder)"
        )
    try:
        return mount(uri)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--storage {shown(uri)}: cannot write there: {reason}") from error


def layout_of(recipe: Recipe, storage: Path, tokens_per_image: int) -> Layout:
    """Folders of a recipe."""
    data = {
        stage.name: data_folder(storage, recipe.data_of(stage), recipe.name, tokens_per_image, recipe.seed)
        for stage in recipe.train.stages
    }
    return Layout(storage, data, storage / "runs" / run_name(recipe))


def run_name(recipe: Recipe) -> str:
    """Name of a recipe's run folder: it depends on what decides the model."""
    return f"{recipe.name}-{digest(identity(recipe))}"


def data_folder(storage: Path, config: DataConfig, name: str, tokens_per_image: int, seed: int) -> Path:
    """Folder of a data set: it depends on what decides the rows, and is called as the config says or else `name`."""
    return storage / "data" / f"{config.name or name}-{data_identity(config, tokens_per_image, seed)[:10]}"


def earlier_data_folder(storage: Path, config: DataConfig, name: str, tokens_per_image: int, seed: int) -> Path:
    """Where versions up to 0.1 prepared the same data set. Sets that differed only in `test` shared this folder."""
    content = identity(config, Decides.RUN)
    return storage / "data" / f"{config.name or name}-{digest(content, tokens_per_image, seed)}"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside, then rename: the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
