"""Where things lie under the one storage folder.

    data/<name>-<digest>/     shards and manifest; shared by every recipe with the same data part
    runs/<name>-<digest>/     one folder per recipe: initial model, stages, checkpoints, evaluation
    mlflow.db, mlflow/        tracking database and artifacts

Digests come from the parts of the recipe that decide the content, so changing a recipe starts beside the old work.
In an object store the same lies under its URI, but for MLflow's, which needs a server then.
"""

import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlmamba.image_layout import TokensPerImage
from pipelines import storage as files
from pipelines.config import DataConfig, data_identity
from pipelines.identity import Decides, digest, identity
from pipelines.manifest import MANIFEST_FILE, Manifest
from workflows.errors import UsageError
from workflows.recipe.schema import Recipe
from workflows.storage.folder import Folder
from workflows.storage.lock import lock


@dataclass(frozen=True)
class Layout:
    """Folders of one recipe under one storage folder."""

    storage: Folder
    data: dict[str, Folder]
    """Data set by stage; stages on the same data share one."""
    run: Folder

    def stage(self, name: str) -> Folder:
        """Model of a finished stage."""
        return self.run / "stages" / name

    @property
    def initial(self) -> Folder:
        """Model put together from its parts, before any training."""
        return self.run / "initial"

    @property
    def checkpoints(self) -> Folder:
        """Ray Train's storage: checkpoints of unfinished stages."""
        return self.run / "checkpoints"

    @property
    def evaluation(self) -> Folder:
        """Answers, scores and reports."""
        return self.run / "evaluation"


def open_storage(storage: str) -> Folder:
    """The storage folder, or the object store of this URI, once it is known that it can be written to.

    Raises:
        UsageError: it cannot.
    """
    folder = Folder(storage)
    if not folder.remote:
        return Folder(str(open_local_storage(storage)))
    probe = f".writable-{uuid.uuid4().hex}"
    try:
        folder.write(probe, b"")
        files.delete((folder / probe).uri)
        folder.local.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--storage {folder}: cannot write there: {reason}") from error
    return folder


def open_local_storage(storage: str) -> Path:
    """Absolute path of a storage folder, made if need be, for commands that keep files of their own there.

    Raises:
        UsageError: it cannot be written to, or is an object store.
    """
    folder = Folder(storage)
    if folder.remote:
        raise UsageError(
            f"--storage {folder}: run, train, prepare and submit keep their work in object stores; this command "
            "wants a folder for its own files (the registry is the one in MLFLOW_TRACKING_URI, whatever the folder)"
        )
    try:
        folder.local.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder.local):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--storage {storage}: cannot write to {folder} ({reason}); choose another folder") from error
    return folder.local


def layout_of(recipe: Recipe, storage: Folder, tokens_per_image: TokensPerImage) -> Layout:
    """Folders of a recipe."""
    data = {
        stage.name: data_folder(storage, recipe.data_of(stage), recipe.name, tokens_per_image, recipe.seed)
        for stage in recipe.train.stages
    }
    return Layout(storage, data, storage / "runs" / run_name(recipe))


def run_name(recipe: Recipe) -> str:
    """Name of a recipe's run folder: it depends on what decides the model."""
    return f"{recipe.name}-{digest(identity(recipe))}"


def data_folder(storage: Folder, config: DataConfig, name: str, tokens_per_image: TokensPerImage, seed: int) -> Folder:
    """Folder of a data set: it depends on what decides the rows, and is called as the config says or else `name`."""
    return storage / "data" / f"{config.name or name}-{data_identity(config, tokens_per_image, seed)[:10]}"


def earlier_data_folder(
    storage: Folder, config: DataConfig, name: str, tokens_per_image: TokensPerImage, seed: int
) -> Folder:
    """Where versions up to 0.1 prepared the same data set. Sets that differed only in `test` shared this folder."""
    content = identity(config, Decides.RUN)
    return storage / "data" / f"{config.name or name}-{digest(content, tokens_per_image, seed)}"


def adopt_earlier(earlier: Folder, folder: Folder, wanted: str, note: Callable[[str], None]) -> None:
    """Give a data set that version 0.1 prepared its new name, if it is the wanted one; say what happens to another.

    Args:
        earlier: where version 0.1 put it, see `earlier_data_folder`.
        folder: where it belongs now.
        wanted: its identity, see `data_identity`.
        note: told what was done.
    """
    if not (earlier / MANIFEST_FILE).exists():
        return
    with lock(earlier.beside(f".{earlier.name}.lock").uri, f"preparation of {earlier.name}", note, wait=True):
        try:
            found = Manifest.load(earlier.uri).recipe_digest
        except (FileNotFoundError, ValueError):
            return
        if found != wanted:
            note(f"{earlier} holds a data set with other test sources and stays as it is")
        elif earlier.remote:
            note(f"{earlier} has been made by version 0.1 and is not used any more: delete it")
        else:
            folder.publish(earlier.local)  # over a preparation that was begun and not finished
            note(f"prepared by version 0.1 as {earlier.name}, which is now called {folder.name}")
