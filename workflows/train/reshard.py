"""A checkpoint for another number of workers, made beside the training: `mlmamba reshard`.

Training reshards a checkpoint by itself when it goes on with another number of workers (restore.py); every worker then
reads all shards. This writes the shards anew, as DeepSpeed would have written them with so many workers, so that each
reads its own. Needs one process, no GPU and the memory of one share: the old shards stay on the disk until they are
read, and the new ones are written one after the other.
"""

import json
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pickle import UnpicklingError

import torch
from deepspeed.utils.tensor_fragment import fragment_address

from pipelines import storage
from workflows.errors import UsageError, WorkflowError
from workflows.storage.folder import Folder
from workflows.storage.lock import lock
from workflows.storage.remote import list_folders
from workflows.train.checkpoint import Checkpoint, CheckpointStore
from workflows.train.restore import MOMENTS, model_files, must_reshard, optimizer_files, whole, zero3_flat, zero12_flat
from workflows.train.saver import load_plain, write_file
from workflows.train.stage import plain_name

_ALIGNED = 2  # elements at whose multiples DeepSpeed lets a worker's partition begin


@dataclass(frozen=True)
class Resharded:
    """What `reshard_run` did.

    Attributes:
        made_by: workers of the checkpoint that was there.
        workers: of the one that is there now.
        size: bytes written; 0 when there was nothing to do.
    """

    checkpoint: Checkpoint
    stage: str
    made_by: int
    workers: int
    size: int

    def __str__(self) -> str:
        where = f"stage {self.stage}, step {self.checkpoint.step}: {self.checkpoint}"
        if self.size:
            made = f"{self.workers} workers ({self.size / 1e6:,.1f} MB), in place of the one of {self.made_by}"
            return f"{where} is a checkpoint of {made}"
        if not self.checkpoint.zero_stage:
            return f"{where} has no shards (zero_stage 0), any number of workers goes on from it: nothing was done"
        return f"{where} is one of {self.workers} workers already: nothing was done"


def reshard_run(
    run: Folder, workers: int, stage: str | None = None, note: Callable[[str], None] = lambda text: None
) -> Resharded:
    """Reshard the newest checkpoint of a run's unfinished stage. It is replaced when the new one is whole.

    Args:
        run: the run's folder.
        workers: how many will go on from it.
        stage: which, where more than one stage has checkpoints.
        note: told about a checkpoint that is damaged and passed over.

    Raises:
        UsageError: there is nothing to reshard, or it does not fit so many workers.
        WorkflowError: the run is being worked on, or its checkpoint is of another model.
        OSError: it cannot be read or written; the checkpoint that was there stays.
    """
    if workers < 1:
        raise UsageError(f"--workers {workers}: give at least 1")
    if not (run / "checkpoints").exists():
        raise UsageError(f"{run} has no checkpoints: name the folder of a run whose training is not finished")
    with lock((run / "lock.json").uri, f"run {run.name}", note):
        name, store, found = _newest(run, stage)
        if not must_reshard(found, workers):
            return Resharded(found, name, found.workers, workers, 0)
        store.sweep_copies()
        while damage := store.fetch(found, 0, everything=True):
            note(f"the checkpoint {found} is damaged and passed over: {damage}")
            store.release(found)
            older = [one for one in store.whole() if one.step < found.step]
            if not older:
                raise WorkflowError(f"all checkpoints of stage {name} of {run} are damaged; the stage begins anew")
            found = older[-1]
        try:
            _refuse(found, workers, run)
            made = _write(store, found, workers)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, UnpicklingError) as error:
            raise WorkflowError(f"{found} is no checkpoint that this version can read: {error!r}") from error
        finally:
            store.release(found)
        store.reject(found)
    return Resharded(made, name, found.workers, workers, sum(made.files.values()))


def _newest(run: Folder, stage: str | None) -> tuple[str, CheckpointStore, Checkpoint]:
    """The stage's name, its checkpoints, and the newest whole one."""
    found = {}
    for folder in list_folders((run / "checkpoints").uri):
        name, dash, _ = folder.rpartition("-")
        if dash and name and not folder.startswith("."):
            store = CheckpointStore(run / "checkpoints" / folder)
            if (newest := store.newest()) is not None:
                found[folder] = (name, store, newest)
    if stage is not None:
        found = {folder: one for folder, one in found.items() if one[0] == stage}
    if not found:
        of = f"stage {stage} of {run}" if stage else f"{run}"
        raise UsageError(f"{of} has no whole checkpoint: there is nothing to reshard")
    if len(found) > 1:
        raise UsageError(
            f"{run} has checkpoints of {len(found)} stages ({', '.join(found)}): "
            "name one by --stage, or delete those that are not wanted"
        )
    return next(iter(found.values()))


def _refuse(found: Checkpoint, workers: int, run: Folder) -> None:
    """Raise when a checkpoint is not of the run's model, or does not fit so many workers."""
    groups = _groups(found)
    known = _shapes(run / "initial")
    for name, shape in (item for group in groups for item in group.items()):
        plain = plain_name(name)
        if plain is not None and known.get(plain) != list(shape):
            there = f"has the shape {known[plain]}" if plain in known else "is not there"
            raise WorkflowError(
                f"the checkpoint {found} is of another model: {name} has the shape {list(shape)}, and in "
                f"{run / 'initial'} it {there}"
            )
    config = load_plain(optimizer_files(found)[0])["ds_config"]
    passes = config["gradient_accumulation_steps"] * found.workers
    if workers > passes:
        rows = config["train_micro_batch_size_per_gpu"]
        raise UsageError(
            f"--workers {workers}: a step has {passes} micro batches of {rows} rows, so more than {passes} workers "
            "have nothing to do"
        )
    for total in (sum(map(_numel, group.values())) for group in groups):
        if found.zero_stage < 3 and _partition(total, workers) * (workers - 1) >= total:
            raise UsageError(f"--workers {workers}: a group of parameters has {total} elements, too few for so many")


def _shapes(model: Folder) -> dict[str, list[int]]:
    """The shapes of a model folder's tensors by name, from the heads of its safetensors files."""
    found: dict[str, list[int]] = {}
    names = storage.list_names(model.uri) if model.exists() else []
    for name in sorted(name for name in names if name.endswith(".safetensors")):
        filesystem, path = storage.open_fs((model / name).uri)
        with filesystem.open_input_file(path) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > 1 << 28:
                raise WorkflowError(f"{model / name} is no safetensors file")
            head = json.loads(file.read(size))
        found |= {key: value["shape"] for key, value in head.items() if key != "__metadata__"}
    if not found:
        raise WorkflowError(f"{model} is not there, so whether the checkpoint is of this run's model cannot be told")
    return found


def _write(store: CheckpointStore, found: Checkpoint, workers: int) -> Checkpoint:
    """Write the checkpoint anew for so many workers; it is whole when this returns."""
    staging = store.staging(found.step, uuid.uuid4().hex[:8])
    try:
        staging.mkdir(parents=True)
        shards = _zero3_shards(found, workers) if found.zero_stage == 3 else _zero12_shards(found, workers)
        for rank, files in enumerate(shards):
            for name, content in files.items():
                write_file(staging / name, content)
            store.publish(staging, rank, list(files))
        made = replace(found, folder=staging, workers=workers, files={}, address="")
        store.complete(staging, made, keep=len(store.whole()) + 1)
    except BaseException:
        store.discard(staging)
        raise
    return next(one for one in store.whole() if one.folder.name == staging.name)


def _zero12_shards(found: Checkpoint, workers: int) -> Iterator[dict[str, dict]]:
    """Every new rank's files under ZeRO-1 and 2: each group of parameters is one flat tensor, cut into equal parts."""
    states = [load_plain(file) for file in optimizer_files(found)]
    old = [state["optimizer_state_dict"] for state in states]
    (model,) = model_files(found)
    groups = _groups(found)
    for rank in range(workers):
        weights, moments, places, paddings = [], {}, [], []
        for number, group in enumerate(groups):
            total = sum(map(_numel, group.values()))
            part = _partition(total, workers)
            start, end = rank * part, min((rank + 1) * part, total)
            weights.append(_cut([zero12_flat(state, number, "fp32") for state in old], start, end))
            step = old[0]["base_optimizer_state"]["state"][number]["step"]
            moments[number] = {"step": step.clone()}
            for key in MOMENTS:
                moment = _cut([zero12_flat(state, number, key) for state in old], start, end)
                moments[number][key] = torch.nn.functional.pad(moment, (0, part - len(moment)))
            places.append(_places(group, start, end))
            paddings.append(part - (end - start))
        base = {**old[0]["base_optimizer_state"], "state": moments}
        state = {
            **old[0],
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": weights,
            "group_paddings": paddings,
            "partition_count": [workers] * len(groups),
            "param_slice_mappings": places,
        }
        files = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": {**states[0], "optimizer_state_dict": state}}
        if rank == 0:
            files[model.name] = {**load_plain(model), "dp_world_size": workers}
        yield files


def _zero3_shards(found: Checkpoint, workers: int) -> Iterator[dict[str, dict]]:
    """Every new rank's files under ZeRO-3: each parameter is cut into equal parts, and a group's parts lie in a row."""
    states = [load_plain(file) for file in optimizer_files(found)]
    old = [state["optimizer_state_dict"] for state in states]
    model = load_plain(model_files(found)[0])
    for rank in range(workers):
        flat: dict[str, list[torch.Tensor]] = {key: [] for key in ("fp32", *MOMENTS)}
        for number, group in enumerate(_groups(found)):
            for key, parts in flat.items():
                held, start, pieces = [zero3_flat(state, number, key) for state in old], 0, []
                for shape in group.values():
                    numel, was = _numel(shape), -(-_numel(shape) // found.workers)
                    full = whole([one[start : start + was] for one in held], numel)
                    part = -(-numel // workers)
                    own = full[rank * part : (rank + 1) * part]
                    pieces.append(torch.nn.functional.pad(own, (0, part - len(own))))
                    start += was
                parts.append(torch.cat(pieces))
        optimizer = old[0]["optimizer_state_dict"]
        moments = {
            number: {"step": optimizer["state"][number]["step"].clone(), **{key: flat[key][number] for key in MOMENTS}}
            for number in range(len(flat["fp32"]))
        }
        state = {
            **old[0],
            "partition_count": workers,
            "optimizer_state_dict": {**optimizer, "state": moments},
            "fp32_flat_groups": flat["fp32"],
        }
        shared = model["shared_params"] if rank == 0 else {}
        yield {
            f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": {**states[0], "optimizer_state_dict": state},
            f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt": {
                **model,
                "dp_world_size": workers,
                "shared_params": shared,
            },
        }


def _groups(found: Checkpoint) -> list[dict[str, torch.Size]]:
    """The optimizer's groups: the shape of each parameter by name, in the order in which they lie."""
    return load_plain(model_files(found)[0])["param_shapes"]


def _partition(total: int, workers: int) -> int:
    """Elements of each worker's part of a group, as DeepSpeed's ZeRO-1 and 2 align it."""
    return -(-total // (_ALIGNED * workers)) * _ALIGNED


def _places(group: dict[str, torch.Size], start: int, end: int) -> "OrderedDict[str, fragment_address]":
    """Where in the part from `start` to `end` of a group each parameter, or a piece of it, lies."""
    places, at = OrderedDict(), 0
    for name, shape in group.items():
        first, last = max(at, start), min(at + _numel(shape), end)
        if first < last:
            places[name] = fragment_address(start=first - start, numel=last - first)
        at += _numel(shape)
    return places


def _cut(parts: list[torch.Tensor], start: int, end: int) -> torch.Tensor:
    """A copy of elements `start` to `end` of parts that lie one after the other."""
    found, at = [], 0
    for part in parts:
        found.append(part[max(start - at, 0) : max(end - at, 0)])
        at += len(part)
    return torch.cat(found)


def _numel(shape: torch.Size) -> int:
    return torch.Size(shape).numel()
