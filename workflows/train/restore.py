"""Resuming from the newest whole checkpoint: all ranks from the same one, or none.

With the same number of workers DeepSpeed loads its own files. With another number the optimizer's shards do not fit:
weights and Adam's moments are put together from all shards and resharded, the weights before DeepSpeed shards the
model, the moments after.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from pipelines.identity import digest
from workflows.train.checkpoint import Checkpoint, CheckpointStore
from workflows.train.job import StageError
from workflows.train.saver import load_plain


def model_digest(model: nn.Module) -> str:
    """Digest of the names and shapes of what trains; take it before ZeRO-3 shards the parameters."""
    return digest([(name, list(p.shape)) for name, p in model.named_parameters() if p.requires_grad])


def find(
    store: CheckpointStore, rank: int, workers: int, zero_stage: int, model: str, on_damage: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint to go on from, fetched; a collective call. Rank 0 chooses it, and sweeps up what cannot be used.

    Args:
        zero_stage, model: as `check` wants them.
        on_damage: told, on every rank, about a checkpoint whose files are not what was written. It is deleted, and an
            older one is taken; without any the stage begins anew.

    Raises:
        StageError: the checkpoint is of another model or kind.
    """
    store.sweep_copies()
    if rank == 0:
        store.sweep()
    while True:
        chosen = [store.newest() if rank == 0 else None]
        dist.broadcast_object_list(chosen)
        dist.barrier()  # no rank fetches, where it keeps copies, while another of its machine still sweeps
        found = chosen[0]
        if found is None:
            return None
        check(found, zero_stage, model)
        damage = [""] * workers
        dist.all_gather_object(damage, store.fetch(found, rank, everything=must_reshard(found, workers)))
        if not any(damage):
            return found
        on_damage(f"the checkpoint {found} is damaged and passed over: {next(filter(None, damage))}")
        if rank == 0:
            store.reject(found)
        else:
            store.release(found)


def check(found: Checkpoint, zero_stage: int, model: str) -> None:
    """Raise StageError when a checkpoint is of another model or kind."""
    remedy = f"delete {found.among} to train the stage from its start"
    if found.model != model:
        raise StageError(f"the checkpoint {found} is of another model: names or shapes of what trains differ; {remedy}")
    if found.zero_stage != zero_stage:
        raise StageError(
            f"the checkpoint {found} was made with zero_stage {found.zero_stage}, not {zero_stage}; {remedy}"
        )


def must_reshard(found: Checkpoint, workers: int) -> bool:
    """Whether a checkpoint's optimizer state is sharded for another number of workers."""
    return bool(found.zero_stage) and found.workers != workers


def load_into_model(found: Checkpoint, model: nn.Module, workers: int) -> None:
    """Load the weights if they must be resharded; call before DeepSpeed shards the model."""
    if must_reshard(found, workers):
        load_weights(found, model)


def load_into_engine(found: Checkpoint, engine, workers: int) -> None:
    """Load optimizer, schedule and, unless `load_into_model` did, the weights."""
    if must_reshard(found, workers):
        load_moments(found, engine)
        _set_schedule(engine, found.step)
    else:
        path, _ = engine.load_checkpoint(str(found.folder.parent), tag=found.folder.name, load_module_strict=False)
        if path is None:
            raise StageError(f"the checkpoint {found} cannot be loaded; delete it to go on without it")
    dist.barrier()  # no rank goes on, and prunes, while another reads


def _set_schedule(engine, step: int) -> None:
    scheduler = engine.lr_scheduler
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler.last_epoch, scheduler._last_lr = step, rates
    engine.global_steps = step


MOMENTS = ("exp_avg", "exp_avg_sq")


def load_weights(found: Checkpoint, model: nn.Module) -> None:
    """Put a checkpoint's float32 weights, and its buffers, into a model that is not sharded yet."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, pieces in _pieces(found, "fp32"):
            parameters[name].copy_(whole(pieces, parameters[name].numel()).view_as(parameters[name]))
        buffers, saved = dict(model.named_buffers()), load_plain(model_files(found)[0])["module"]
        for name in buffers.keys() & saved.keys():
            buffers[name].copy_(saved[name])


def load_moments(found: Checkpoint, engine) -> None:
    """Put a checkpoint's Adam moments into an engine, whose weights are already those of the checkpoint."""
    optimizer = engine.optimizer
    step, states = _adam_step(found), {}
    groups = _zero3_places(engine) if found.zero_stage == 3 else _zero12_places(engine)
    places = {}
    for flat, members in groups:
        moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
        place = flat.device if optimizer.optimizer.defaults["fused"] else None  # the fused kernel counts on its device
        optimizer.optimizer.state[flat] = {"step": torch.tensor(float(step), device=place), **moments}
        states |= dict.fromkeys(members, moments)
        places |= members
    for key in MOMENTS:
        for name, pieces in _pieces(found, key):
            if name in places:
                start, numel, offset, size = places[name]
                states[name][key][start : start + numel] = whole(pieces, size)[offset : offset + numel]


def _zero12_places(engine) -> Iterator[tuple[torch.Tensor, dict[str, tuple]]]:
    """Per group its flat partition, and where in it this rank's piece of a parameter is:
    (start in the partition, length, start in the parameter, size of the parameter)."""
    optimizer = engine.optimizer
    for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        members = {}
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
                members[optimizer.param_names[parameter]] = (there.start, there.numel, here.start, parameter.numel())
        yield flat, members


def _zero3_places(engine) -> Iterator[tuple[torch.Tensor, dict[str, tuple]]]:
    """The same under ZeRO-3."""
    optimizer, rank = engine.optimizer, engine.global_rank
    for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        members, start = {}, 0
        for parameter in group:
            piece, size = parameter.ds_tensor.ds_numel, parameter.ds_numel
            offset = min(rank * piece, size)
            members[optimizer.param_names[parameter]] = (start, min(piece, size - offset), offset, size)
            start += piece
        yield flat, members


def _pieces(found: Checkpoint, key: str) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Every parameter's pieces of a kind ("fp32" or one of MOMENTS), in the order of the ranks that made them."""
    states = [load_plain(file)["optimizer_state_dict"] for file in optimizer_files(found)]
    if found.zero_stage == 3:
        shapes = load_plain(model_files(found)[0])["param_shapes"]
        for group, members in enumerate(shapes):
            start = 0
            for name, shape in members.items():
                piece = -(-torch.Size(shape).numel() // found.workers)
                yield name, [zero3_flat(state, group, key)[start : start + piece] for state in states]
                start += piece
        return
    for group in range(len(states[0]["param_slice_mappings"])):
        pieces: dict[str, list[torch.Tensor]] = {}
        for state in states:
            flat = zero12_flat(state, group, key)
            for name, place in state["param_slice_mappings"][group].items():
                pieces.setdefault(name, []).append(flat[place.start : place.start + place.numel])
        yield from pieces.items()


def zero12_flat(state: dict, group: int, key: str) -> torch.Tensor:
    if key == "fp32":
        return state["single_partition_of_fp32_groups"][group]
    return state["base_optimizer_state"]["state"][group][key]


def zero3_flat(state: dict, group: int, key: str) -> torch.Tensor:
    return state["fp32_flat_groups"][group] if key == "fp32" else state["optimizer_state_dict"]["state"][group][key]


def whole(pieces: list[torch.Tensor], numel: int) -> torch.Tensor:
    return torch.cat([piece.flatten() for piece in pieces])[:numel]


def _adam_step(found: Checkpoint) -> float:
    state = load_plain(optimizer_files(found)[0])["optimizer_state_dict"]
    base = state["optimizer_state_dict" if found.zero_stage == 3 else "base_optimizer_state"]
    return float(base["state"][0]["step"])


def optimizer_files(found: Checkpoint) -> list:
    files = sorted((name for name in found.files if name.endswith("optim_states.pt")), key=_rank)
    if len(files) != found.workers:
        raise RuntimeError(f"the checkpoint {found.folder} has {len(files)} optimizer files, not {found.workers}")
    return [found.folder / name for name in files]


def model_files(found: Checkpoint) -> list:
    return [found.folder / name for name in sorted(found.files) if name.endswith("model_states.pt")]


def _rank(name: str) -> int:
    """zero_pp_rank_11_mp_rank_00_optim_states.pt -> 11."""
    return int(name.split("pp_rank_")[1].split("_")[0])
