"""What Ray Train's own processes load: the workers' entry point, and the desk between them and the driver.

Light on imports, because Ray Train's controller and its helpers load this file too, and none of them needs torch.
"""

import asyncio
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.train.backend import Backend, BackendConfig

OnEvent = Callable[[dict], None]
logger = logging.getLogger(__name__)


class NodeTakenBack(RuntimeError):
    """Workers leave, with a checkpoint behind them, because the node of one is about to be taken back."""


class MoreRoom(RuntimeError):
    """Workers leave, with a checkpoint behind them, because there is room for more of them."""


_more_room = threading.Event()


def make_room() -> None:
    """Runs in a worker: have it leave after the step that it is at."""
    _more_room.set()


def told() -> bool:
    """In a worker: whether the group is to leave, for one reason or the other."""
    return _more_room.is_set() or _taken_back()


def _taken_back() -> bool:
    """Whether Ray Train has said that the node of one of the group's workers is about to be taken back.

    `ray.train.get_preemption_info` says the same, but has all workers wait for each other at every call.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def run_jobs(config: dict) -> None:
    """A worker's life: one job after the other from the Desk in `config["desk"]`, until there is none."""
    with lean_imports():
        from workflows.train.loop import Left, work

    try:
        work(config["desk"], told)
    except Left as left:  # the controller does without the loop's file
        raise (NodeTakenBack if _taken_back() else MoreRoom)(str(left)) from None


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import torch, DeepSpeed and the model in two thirds of the time.

    Without collecting garbage, of which imports make none; and without what others import where it is installed and
    workers have no use for: MLflow (DeepSpeed's autotuner; workers report to the driver) and scipy (losses of
    transformers for other models).
    """
    absent = {name: None for name in ("mlflow", "scipy") if name not in sys.modules}
    collecting = gc.isenabled()
    gc.disable()
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name)
        gc.freeze()
        if collecting:
            gc.enable()


@ray.remote(num_cpus=0)
class Desk:
    """An actor through which the driver gives jobs to the workers, one at a time, and they answer.

    A job is finished when every worker of one group has finished it. A group that Ray Train starts in place of one that
    failed is given the job that was not finished.
    """

    def __init__(self):
        self._latest = 0
        self._job: bytes | None = None
        self._outcomes: dict[str, dict[int, dict]] = {}
        self._result: dict | None = {}
        self._events: list[dict] = []
        self._changed = asyncio.Condition()

    async def give(self, job: bytes | None) -> None:
        """Put a pickled job there; None sends the workers home."""
        async with self._changed:
            self._latest, self._job = self._latest + 1, job
            self._outcomes, self._result = {}, None
            self._changed.notify_all()

    async def number(self) -> int:
        """The number of the job that was given last."""
        return self._latest

    async def next(self, after: int) -> tuple[int, bytes | None]:
        """The number of the job that is not finished, and the job; waits for one with a number over `after`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._latest > after and self._result is None)
            return self._latest, self._job

    async def finish(self, number: int, group: str, rank: int, world: int, outcome: dict) -> None:
        """A worker has finished a job; rank 0's outcome counts, and a `failed` of any."""
        async with self._changed:
            if number == self._latest and self._result is None:
                done = self._outcomes.setdefault(group, {})
                done[rank] = outcome
                if len(done) == world:
                    self._result = next((one for one in done.values() if "failed" in one), done[0])
                    self._changed.notify_all()

    async def add(self, event: dict) -> None:
        """Put an event there for the driver."""
        async with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    async def take(self, seconds: float) -> tuple[list[dict], dict | None]:
        """The events since the last call, and the job's outcome once it is finished; waits a while for either."""
        async with self._changed:
            try:
                there = self._changed.wait_for(lambda: self._events or self._result is not None)
                await asyncio.wait_for(there, seconds)
            except TimeoutError:
                pass
            events, self._events = self._events, []
            return events, self._result


@dataclass
class JoinedByTorch(BackendConfig):
    """The workers form a torch process group, as with Ray's TorchConfig, whose module would bring torch into the driver
    and the controller.

    Attributes:
        kind: nccl or gloo.
    """

    kind: str

    @property
    def backend_cls(self) -> type[Backend]:
        return _Joining


class _Joining(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group, backend_config: JoinedByTorch) -> None:
        from ray.train._internal.utils import get_address_and_port

        ray.get(worker_group.execute_async(_load))  # takes seconds, in which another process might take the port
        address, port = worker_group.execute_single(0, get_address_and_port)
        world, kind = len(worker_group), backend_config.kind
        joining = [worker_group.execute_single_async(i, _join, kind, i, world, address, port) for i in range(world)]
        ray.get(joining)

    def on_shutdown(self, worker_group, backend_config: JoinedByTorch) -> None:
        try:
            ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=30)
        except ray.exceptions.GetTimeoutError:
            logger.warning("the workers' process group did not close within 30 s")


def _load() -> None:
    """Runs in a worker: torch and all that is heavy."""
    with lean_imports():
        from ray.train.torch import config  # noqa: F401

        import workflows.train.loop  # noqa: F401


def _join(kind: str, rank: int, world: int, address: str, port: int) -> None:
    """Runs in a worker: Ray's own set-up of a process group."""
    import os

    from ray.train.torch import config

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(kind, rank, world, "env://")


def _leave(several: bool) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=several)
