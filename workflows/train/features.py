"""Features of a frozen encoder, kept: each image goes through the encoder once and not once an epoch.

    <data set>/features/<key>/00000.npy    features of 256 images (images, N, d_v), float32, or bfloat16 as int16
                              index.npy    digests of all images, sorted, (images, 16) uint8; written last

The key is a digest of the encoder (config, weights, precision), of the rules of colour and of the images, so that what
is found is right or is not found. The images are sorted by their digests and cut into parts that any worker may make: a
killed stage goes on with the parts that are there, and another number of workers uses the same. What a step computes
differs from the encoder in the step by rounding alone, as other images share its batch.
"""

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mlmamba.images import load_pixels
from pipelines import storage
from pipelines.identity import digest
from pipelines.packed import PackedDataset
from pipelines.schema import DIGEST_BYTES
from pipelines.schema import digest as image_digest
from workflows.recipe.train import StageRecipe, TrainRecipe
from workflows.train.job import StageError
from workflows.train.stage import total_steps

INDEX = "index.npy"
_PART, _AT_ONCE = 256, 32  # images in a file, and in a batch of the encoder
_LEAST_PASSES = 2.0  # so often must an image be shown on average that keeping its features pays
_MOST_OF_DISK = 0.5  # of what is free


@dataclass(frozen=True)
class Pays:
    """Whether features are worth keeping."""

    passes: float
    """How often a record's image is shown on average."""
    bytes: int
    """All features."""
    free: int
    """Of the disk."""

    @property
    def why_not(self) -> str:
        """Empty where they are."""
        if self.passes < _LEAST_PASSES:
            return f"an image is shown {self.passes:.2g} times"
        if self.bytes > _MOST_OF_DISK * self.free:
            return f"they would take {self.bytes / 2**30:.1f} GiB of the {self.free / 2**30:.1f} GiB that are free"
        return ""


class Features:
    """The kept features of a data set. Rows may be read in several threads at once."""

    def __init__(self, folder: Path):
        digests = np.load(folder / INDEX)
        self._places = {one.tobytes(): place for place, one in enumerate(digests)}

        @cache
        def part(number: int) -> np.ndarray:
            return np.load(_file(folder, number), mmap_mode="r")

        self._part = part

    def of(self, images: list[bytes]) -> torch.Tensor:
        """Features (images, N, d_v) of encoded images, all of which were in the data set."""
        found = []
        for image in images:
            number, row = divmod(self._places[image_digest(image)], _PART)
            found.append(self._part(number)[row])
        if not found:
            return _tensor(self._part(0)[:0].copy())
        return _tensor(np.stack(found))


def keep_features(
    model: nn.Module,
    datasets: list[PackedDataset],
    data: str,
    stage: StageRecipe,
    train: TrainRecipe,
    group: tuple[int, int],
    say: Callable[[str], None],
) -> Features | None:
    """The features of the images of a stage, made where they are not there; a collective call.

    Args:
        model: before an engine shards it; its encoder is frozen.
        datasets: the training split, and the validation split if it is measured.
        data: folder of the data set.
        group: rank and number of workers.
        say: told what is done and why.

    Raises:
        StageError: they are asked for and cannot be kept.
    """
    wish, (rank, world) = stage.keep_features, group
    if wish == "never":
        return None
    if why := impossible(model, data, stage):
        return _without(wish, why, say)
    folder, split = Path(data) / "features", datasets[0].manifest.splits["train"]
    agreed = [pays(model, stage, train, split.rows, split.images, folder).why_not if wish == "auto" else ""]
    dist.broadcast_object_list(agreed)
    if agreed[0]:
        return _without(wish, agreed[0], say)
    digests = _digests(datasets)
    folder /= _key(model, datasets[0], digests, train)
    there = [(folder / INDEX).exists()]
    dist.broadcast_object_list(there)
    if not there[0]:
        size = len(digests) * _bytes_of_one(model, train) / 1e6
        say(f"computing the features of {len(digests):,} images ({size:,.0f} MB), which are kept ...")
        problem = _make(model, datasets, digests, folder, train, rank, world)
        problems = [problem] * world
        dist.all_gather_object(problems, problem)
        if why := next(filter(None, problems), ""):
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            return _without(wish, why, say)
        if rank == 0:
            sorted_digests = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
            storage.write_atomic(str(folder / "encoder.json"), json.dumps(_encoder(model, train), indent=1))
            _write(folder / INDEX, sorted_digests)
        dist.barrier()
    else:
        say(f"the features of {len(digests):,} images are there")
    return Features(folder)


def impossible(model, data: str, stage: StageRecipe) -> str:
    """Why features cannot be kept whatever they would save; "" where they can."""
    if not storage.is_local(data):
        return "the data set is in an object store"
    if model.image_layout.fixed is None:
        return "an image's size decides how many there are"
    return "images or encoder change" if "vision" in stage.trains or stage.augment else ""


def _without(wish: str, why: str, say: Callable[[str], None]) -> None:
    if wish == "always":
        raise StageError(f"keep_features is always, and features cannot be kept: {why}; set it to auto or never")
    say(f"features of the frozen encoder are not kept: {why}")


def _digests(datasets: list[PackedDataset]) -> list[bytes]:
    """Of all distinct images, sorted."""
    return sorted({one for dataset in datasets for index in range(len(dataset)) for one in _row(dataset, index)})


def _row(dataset: PackedDataset, index: int) -> list[bytes]:
    return [image_digest(image) for image in dataset[index].images]


def pays(model, stage: StageRecipe, train: TrainRecipe, rows: int, images: int, folder: Path) -> Pays:
    """Whether features in `folder` are worth it, of so many rows and images; an image counts as often as records show
    it. The manifest has both, and a plan estimates them: no corpus is read to decide."""
    passes = total_steps(stage, rows) * stage.batch_rows / max(1, rows) * bool(images)
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return Pays(passes, images * _bytes_of_one(model, train), shutil.disk_usage(there).free)


def _bytes_of_one(model, train: TrainRecipe) -> int:
    height, width = model.vision.grid
    return height * width * model.vision.channels * (2 if train.precision == "bf16" else 4)


def _encoder(model, train: TrainRecipe) -> dict:
    config = model.config.vision_config
    weights = [(name, image_digest(value.detach().contiguous().view(torch.uint8).numpy().tobytes()).hex())
               for name, value in model.vision.state_dict().items() if value.ndim]  # fmt: skip
    return {"config": config.to_dict(), "precision": train.precision, "weights": digest(weights)}


def _key(model, dataset: PackedDataset, digests: list[bytes], train: TrainRecipe) -> str:
    return digest(_encoder(model, train), dataset.manifest.pixels, image_digest(*digests).hex())


def _make(model, datasets, digests: list[bytes], folder: Path, train: TrainRecipe, rank: int, world: int) -> str:
    """Compute this rank's parts. Returns what went wrong, or ""."""
    parts = range(rank, -(-len(digests) // _PART), world)
    wanted = {one: None for part in parts for one in digests[part * _PART : (part + 1) * _PART]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        where = _where(datasets, wanted)
        for part in parts:
            if not _file(folder, part).exists():
                own = digests[part * _PART : (part + 1) * _PART]
                _write(_file(folder, part), _encode(model, [where[one] for one in own], train))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return f"{'the disk is full' if full else error} (while writing to {folder})"
    return ""


def _where(datasets: list[PackedDataset], wanted: dict) -> dict[bytes, tuple[PackedDataset, int, int]]:
    """Where each of some images is: data set, row, and its number in the row."""
    found = {}
    for dataset in datasets:
        for index in range(len(dataset)):
            for number, one in enumerate(_row(dataset, index)):
                if one in wanted:
                    found.setdefault(one, (dataset, index, number))
    return found


@torch.no_grad()
def _encode(model, places: list[tuple[PackedDataset, int, int]], train: TrainRecipe) -> np.ndarray:
    device = torch.device("cuda" if train.gpus_per_worker and torch.cuda.is_available() else "cpu")
    vision, size = model.vision.to(device).eval(), model.config.vision_config.image_size
    made = []
    half = torch.autocast(device.type, torch.bfloat16) if train.precision == "bf16" else nullcontext()
    with half:
        for first in range(0, len(places), _AT_ONCE):
            rows = [(dataset[index], number) for dataset, index, number in places[first : first + _AT_ONCE]]
            pixels = np.stack([load_pixels(row.images[number], size, row.pixels) for row, number in rows])
            made.append(vision(torch.from_numpy(pixels).to(device)).cpu())
    vision.to("cpu")
    features = torch.cat(made)
    if train.precision == "bf16":
        return features.to(torch.bfloat16).view(torch.int16).numpy()
    return features.float().numpy()


def _tensor(features: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(features)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def _file(folder: Path, part: int) -> Path:
    return folder / f"{part:05d}.npy"


def _write(file: Path, values: np.ndarray) -> None:
    with storage.atomic_file(str(file)) as path, open(path, "wb") as sink:
        np.save(sink, values)
