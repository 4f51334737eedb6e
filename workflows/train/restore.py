"""Going on from the newest whole checkpoint: all ranks from the same one, or none."""

import torch.distributed as dist
from torch import nn

from pipelines.identity import digest
from workflows.train.checkpoint import Checkpoint
from workflows.train.job import StageError
from workflows.train.reshard import load_moments, load_weights
from workflows.train.store import FolderStore, ObjectStore


def model_digest(model: nn.Module) -> str:
    """Digest of the names and shapes of what trains; take it before ZeRO-3 shards the parameters."""
    return digest([(name, list(p.shape)) for name, p in model.named_parameters() if p.requires_grad])


def find(store: FolderStore | ObjectStore, rank: int) -> Checkpoint | None:
    """The checkpoint to go on from, chosen by rank 0 for all; a collective call. Sweeps up what cannot be used."""
    chosen: list[Checkpoint | None] = [None]
    store.sweep_here()
    if rank == 0:
        store.sweep()
        chosen = [store.newest()]
    dist.broadcast_object_list(chosen)
    dist.barrier()  # no rank fetches, where it keeps copies, while another of its machine still sweeps
    return chosen[0]


def check(found: Checkpoint, zero_stage: int, model: str) -> None:
    """Raise StageError when a checkpoint is of another model or kind."""
    remedy = f"delete {found.among} to train the stage from its start"
    if found.model != model:
        raise StageError(f"the checkpoint {found} is of another model: names or shapes of what trains differ; {remedy}")
    if found.zero_stage != zero_stage:
        raise StageError(
            f"the checkpoint {found} was made with zero_stage {found.zero_stage}, not {zero_stage}; {remedy}"
        )


def reshards(found: Checkpoint, workers: int) -> bool:
    """Whether the optimizer's shards in a checkpoint are cut for another number of workers."""
    return bool(found.zero_stage) and found.workers != workers


def before_engine(found: Checkpoint, model: nn.Module, workers: int) -> None:
    """What has to be loaded before DeepSpeed shards the model: the weights, if they are to be cut anew."""
    if reshards(found, workers):
        load_weights(found, model)


def into_engine(found: Checkpoint, engine, workers: int) -> None:
    """Load optimizer, schedule and, unless `before_engine` did, the weights."""
    if reshards(found, workers):
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
