"""Where things lie under the one storage folder.

    data/<name>-<digest>/     shards and manifest; shared by every recipe with the same data part
    runs/<name>-<digest>/     one folder per recipe: initial model, stages, checkpoints, evaluation
    mlflow.db, mlflow/        tracking database and artifacts

Digests come from the parts of the recipe that decide the content, so changing a recipe starts beside the old work.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import DataConfig
from workflows.config import Recipe, digest
from workflows.configs.train import HOW_IT_RUNS
from workflows.errors import UsageError

UNDECIDING = {"register_as": True, "evaluate": True, "train": HOW_IT_RUNS}
"""Fields of a recipe that the trained model does not depend on."""


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


def open_storage(storage: str) -> Path:
    """Absolute path of the storage folder, made if need be.

    Raises:
        UsageError: it is not a local path, or cannot be written.
    """
    if "://" in storage and not storage.startswith("file://"):
        raise UsageError(
            f"--storage {storage}: this version keeps runs in a folder that every node sees (a local disk or a "
            "network file system); object stores are read as data sources only"
        )
    path = Path(storage.removeprefix("file://")).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--storage {storage}: cannot write to {path} ({reason}); choose another folder") from error
    return path


def layout_of(recipe: Recipe, storage: Path, tokens_per_image: int) -> Layout:
    """Folders of a recipe."""
    data = {
        stage.name: data_folder(storage, recipe.data_of(stage), recipe.name, tokens_per_image, recipe.seed)
        for stage in recipe.train.stages
    }
    return Layout(storage, data, storage / "runs" / run_name(recipe))


def run_name(recipe: Recipe) -> str:
    """Name of a recipe's run folder: it depends on what decides the model."""
    return f"{recipe.name}-{digest(recipe.model_dump(mode='json', exclude=UNDECIDING))}"


def data_folder(storage: Path, config: DataConfig, name: str, tokens_per_image: int, seed: int) -> Path:
    """Folder of a data set: it depends on what decides the rows, and is called as the config says or else `name`."""
    content = config.model_dump(mode="json", exclude={"name", "test", "partition_records", "max_quarantined"})
    return storage / "data" / f"{config.name or name}-{digest(content, tokens_per_image, seed)}"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside, then rename: the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
