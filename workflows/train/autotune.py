"""What a recipe leaves to a measurement (`auto`): rows that a worker runs at once, and chunks of the scans.

At a stage's first start its workers run some of its rows forward and backward in each way, for some seconds, and the
fastest way is taken. What comes out of a step differs between them by rounding alone. It is chosen once and kept beside
the checkpoints, so that a stage that resumes, on whatever machine, computes what it would have computed.

    <checkpoints>/chosen.json    {"micro_batch_rows": 2, "chunks": {"language_model": 64}}

All workers measure at once, and the slowest of them counts.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.distributed as dist
from torch import nn

from mlmamba.selective_scan import SelectiveScan
from workflows.recipe.model import UNMEASURED_CHUNK
from workflows.recipe.train import AUTO
from workflows.train.checkpoint import CheckpointStore
from workflows.train.job import StageError, StageJob

FILE = "chosen.json"
CHUNKS = (16, 32, 64)
"""Lengths that are tried; mlmamba/ops/chunked.py takes no longer ones on a CPU."""
_SECONDS = 20.0  # all measurements of a stage, about
_ROUNDS = 3  # each way is measured so often, in turns, and its best time counts
_GAIN = 0.02  # a way that keeps more in memory must save at least this share

ROWS = "micro_batch_rows"
Make = Callable[[int], Callable]
"""From rows that run at once to what makes micro batches of rows, as `batch_maker` gives it."""


@dataclass(frozen=True)
class Chosen:
    """What a stage computes with."""

    micro_batch_rows: int
    chunks: dict[str, int] = field(default_factory=dict)
    """By part, of the parts whose chunk the recipe leaves open."""

    def with_value(self, name: str, value: int) -> "Chosen":
        """With another value of micro_batch_rows or of a part's chunk."""
        if name == ROWS:
            return replace(self, micro_batch_rows=value)
        return replace(self, chunks=self.chunks | {name: value})

    def value(self, name: str) -> int:
        """Of micro_batch_rows or of a part's chunk."""
        return self.micro_batch_rows if name == ROWS else self.chunks[name]

    @property
    def flat(self) -> dict[str, int]:
        """All values by one name each, for logs."""
        return {ROWS: self.micro_batch_rows, **{f"chunk_size.{part}": chunk for part, chunk in self.chunks.items()}}


def choose(
    job: StageJob,
    model: nn.Module,
    make: Make,
    store: CheckpointStore,
    rank: int,
    say: Callable[[str], None],
) -> Chosen:
    """What the recipe says, or what was chosen for this stage before, or what is fastest here; a collective call. The
    chunks are those of the model's scans afterwards.

    Args:
        model: in training mode, before an engine shards it.
        make: micro batches of the stage's rows.
        store: the stage's checkpoints.
        rank: this worker's; rank 0 reads and writes.
        say: told what was chosen and why.

    Raises:
        StageError: it cannot be written down.
    """
    ways = _ways(job, model)
    rows = job.train.micro_batches(job.stage)
    chosen = Chosen(rows[0], dict.fromkeys(job.measured_chunks, UNMEASURED_CHUNK))
    if job.stage.micro_batch_rows != AUTO and not job.measured_chunks:
        return chosen
    known = [_read(store, ways, job, say) if rank == 0 else None]
    dist.broadcast_object_list(known)
    if known[0]:
        chosen = known[0]
        say(f"goes on with {_named(chosen)}, as measured at the first start")
    else:
        chosen = _measure(job, model, make, chosen, ways, rows[-1], say)
        _write(store, chosen, rank, job.stage.name)
    _set_chunks(model, chosen)
    return chosen


def _ways(job: StageJob, model: nn.Module) -> dict[str, list[int]]:
    """What is open, with the values to try; those with one value need no measurement."""
    ways = {ROWS: job.train.micro_batches(job.stage)}
    cells = model.vision.grid[0] * model.vision.grid[1] if model.image_layout.fixed else max(CHUNKS)
    for part in job.measured_chunks:
        length = cells if part == "connector" else model.config.max_position_embeddings
        shorter = [chunk for chunk in CHUNKS if chunk < length]
        enough = [chunk for chunk in CHUNKS if chunk >= length][:1]
        ways[part] = shorter + enough if _scans(getattr(model, part)) else [UNMEASURED_CHUNK]
    return ways


def _measure(
    job: StageJob, model: nn.Module, make: Make, chosen: Chosen, ways: dict, count: int, say: Callable[[str], None]
) -> Chosen:
    """Try one thing after the other. Leaves the model as it was, but for its chunks."""
    passes = _Passes(model, make, count, job.train.precision == "bf16")
    start, told = time.perf_counter(), []
    with _without_traces(model):
        once = passes.seconds(chosen)  # also what is only slow the first time
        for name, values in ways.items():
            if len(values) == 1:
                chosen = chosen.with_value(name, values[0])
                continue
            tried = [chosen.with_value(name, value) for value in values]
            spent = _slowest(time.perf_counter() - start)
            if spent + once * len(tried) > _SECONDS:
                told.append(f"{_label(name)} {chosen.value(name)} (not measured: a pass takes {once:.0f} s)")
                continue
            rounds = max(1, min(_ROUNDS, int((_SECONDS - spent) / (once * len(tried)))))
            times = [passes.seconds(way) for _ in range(rounds) for way in tried]
            best = [min(times[index :: len(tried)]) for index in range(len(tried))]
            chosen, once = tried[_fastest(best)], min(best)
            each = ", ".join(f"{value}: {seconds:.2f}" for value, seconds in zip(values, best, strict=True))
            told.append(f"{_label(name)} {chosen.value(name)} ({each} s)")
    if told:
        say(f"measured in {time.perf_counter() - start:.0f} s: {'; '.join(told)}")
    return chosen


def _fastest(seconds: list[float]) -> int:
    """The first, but that each later one must save something over the best before it."""
    best = 0
    for index, one in enumerate(seconds):
        if one < seconds[best] * (1 - _GAIN):
            best = index
    return best


class _Passes:
    """Forward and backward passes over the same rows, whatever runs at once."""

    def __init__(self, model: nn.Module, make: Make, rows: int, half: bool):
        self._model, self._make, self._rows, self._half = model, make, list(range(rows)), half
        self._batches: dict[int, list] = {}

    def seconds(self, way: Chosen) -> float:
        """Of the slowest worker; a collective call."""
        rows = way.micro_batch_rows
        if rows not in self._batches:
            self._batches[rows] = self._make(rows)(self._rows)
        _set_chunks(self._model, way)
        dist.barrier()
        start = time.perf_counter()
        for batch in self._batches[rows]:
            with torch.autocast("cpu", torch.bfloat16) if self._half else nullcontext():
                loss = self._model(**batch.inputs, num_items_in_batch=1, logits_to_keep=1, use_cache=False).loss
            loss.backward()
        return _slowest(time.perf_counter() - start)


@contextmanager
def _without_traces(model: nn.Module) -> Iterator[None]:
    """Train the model in the block, and leave no gradient, no changed buffer and no drawn random number behind."""
    training, drawn = model.training, torch.get_rng_state()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    try:
        yield
    finally:
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
        model.zero_grad(set_to_none=True)
        model.train(training)
        torch.set_rng_state(drawn)


def _slowest(seconds: float) -> float:
    """The most of all workers."""
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def _set_chunks(model: nn.Module, chosen: Chosen) -> None:
    for part, chunk in chosen.chunks.items():
        for scan in _scans(getattr(model, part)):
            scan.chunk = chunk


def _scans(part: nn.Module) -> list[SelectiveScan]:
    return [module for module in part.modules() if isinstance(module, SelectiveScan)]


def _read(store: CheckpointStore, ways: dict, job: StageJob, say: Callable[[str], None]) -> Chosen | None:
    """What was chosen before; None where nothing was, or nothing that this stage could have chosen."""
    if (text := store.read(FILE)) is None:
        if store.newest():
            say(f"{FILE} is gone from {store.address}: measured anew, and sums may differ in their last bits")
        return None
    try:
        found = Chosen(**json.loads(text))
        if set(found.chunks) == set(job.measured_chunks) and all(found.value(name) in ways[name] for name in ways):
            return found
    except (ValueError, TypeError, AttributeError, KeyError):
        pass
    say(f"{FILE} in {store.address} is damaged or of another stage: measured anew")
    return None


def _write(store: CheckpointStore, chosen: Chosen, rank: int, stage: str) -> None:
    problem = [""]
    if rank == 0:
        try:
            store.write(FILE, json.dumps(asdict(chosen)))
        except OSError as error:
            problem = [f"stage {stage}: what was chosen for it cannot be kept in {store.address}: {error}"]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise StageError(problem[0])


def _label(name: str) -> str:
    return name if name == ROWS else f"chunk_size of the {name.replace('_', ' ')}"


def _named(chosen: Chosen) -> str:
    parts = [f"{ROWS} {chosen.micro_batch_rows}"]
    return ", ".join(parts + [f"{_label(part)} {chunk}" for part, chunk in chosen.chunks.items()])
