"""Running a function over many small task descriptions on Ray Data, quietly."""

import json
import logging
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

_MOST_PER_BLOCK = 8
_AT_ONCE, _AT_ONCE_PER_CPU = 1024, 64  # descriptions that the driver holds, at least
_OF_THE_REST = 2  # a read task gets a CPU's share of what is left, divided by this


def ensure_ray(verbose: bool = False, say: Callable[[str], None] = lambda text: None) -> None:
    """Connect to Ray, or start a local one, unless the caller has. It stays up for the caller's next step.

    Args:
        verbose: show the workers' own output.
        say: told before what is being started, which takes from seconds to half a minute.

    Raises:
        ConnectionError: nothing answers at RAY_ADDRESS, or Ray does not start on this machine.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address == "local":  # Ray's word for one of its own on this machine
        address = ""
    say(f"connecting to the Ray cluster at {address}" if address else "starting Ray on this machine")
    try:
        _check_reachable(address)
        ray.init(log_to_driver=verbose, logging_level=logging.ERROR, include_dashboard=False)
    except Exception as error:  # Ray raises bare ones, as when its node takes over 30 seconds to start
        ray.shutdown()
        if address and isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
            problem = f"there is no Ray cluster at RAY_ADDRESS = {address} ({error}): start it, or unset it"
            raise ConnectionError(f"{problem} to use this machine") from error
        where = f"the Ray cluster at RAY_ADDRESS = {address} cannot be used" if address else "Ray did not start"
        raise ConnectionError(
            f"{where}: {type(error).__name__}: {error}. When the machine was busy or short of memory, run again: what "
            "is finished is kept"
        ) from error


def _check_reachable(address: str) -> None:
    """Fail at once where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """No progress bars and nothing below an error from Ray Data on the terminal; its log file stays complete."""
    context = ray.data.DataContext.get_current()
    bars = context.enable_progress_bars
    consoles = [
        handler
        for handler in logging.getLogger("ray.data").handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
    levels = [handler.level for handler in consoles]
    context.enable_progress_bars = False
    for handler in consoles:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)


class Tasks(Datasource):
    """Task descriptions as a source of their results: each read task of Ray Data does some of them.

    Ray Data's progress, statistics and dashboard show them under `name`.
    """

    def __init__(self, name: str, function: Callable[[dict], dict], blocks: list[list[dict]]):
        super().__init__()
        self._name, self._function, self._blocks = name, function, blocks

    def get_name(self) -> str:
        """What Ray Data calls it."""
        return self._name

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown; results are small."""
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit=None, data_context=None) -> list[ReadTask]:
        """One for each block."""
        return [
            ReadTask(partial(_results, self._function, json.dumps(block)), BlockMetadata(len(block), None, None, None))
            for block in self._blocks
        ]


def run_tasks(function: Callable[[dict], dict], tasks: Iterable[dict], name: str = "") -> Iterator[dict]:
    """Apply a function to each task description, on all CPUs, and yield the results as they come.

    Descriptions and results cross as JSON text: they are small and nested, which Arrow columns would make awkward.
    Ray Data takes some 5 ms of the driver for a read task, and a CPU waits twice for its next look, ten times a second,
    before it gets the next one. So one holds up to `_MOST_PER_BLOCK` descriptions, fewer towards the end (`_blocks`).
    Of the descriptions, `_AT_ONCE` are taken from `tasks` at a time, more where there are many CPUs: the driver's
    memory does not grow with their number.

    Args:
        function: a module-level function; it must be safe to run twice (Ray reruns tasks of lost machines).
        tasks: JSON-able descriptions.
        name: for Ray's dashboard and log; by default the function's.

    Raises:
        OSError, ValueError: as a task raised it (a full disk, a store that does not answer, a list that is not JSON),
            an OSError with the machine's name, both without Ray's traceback.
    """
    waiting = iter(tasks)
    name = name or function.__name__.title().replace("_", "")
    cpus = int(ray.cluster_resources().get("CPU", 1))
    while some := list(islice(waiting, max(_AT_ONCE, _AT_ONCE_PER_CPU * cpus))):
        blocks = list(_blocks(some, cpus))
        dataset = ray.data.read_datasource(Tasks(name, function, blocks), override_num_blocks=len(blocks))
        for row in dataset.iter_rows():
            result = json.loads(row["result"])
            if "failed" in result:
                raise OSError(*result["failed"])
            if "wrong" in result:
                raise ValueError(result["wrong"])
            yield result["done"]


def _blocks(tasks: list[dict], cpus: int) -> Iterator[list[dict]]:
    """The tasks in blocks, the largest first and single ones last, so that no CPU has much to do when the others end
    (guided self-scheduling: Polychronopoulos and Kuck 1987)."""
    start = 0
    while start < len(tasks):
        share = math.ceil((len(tasks) - start) / (_OF_THE_REST * cpus))
        end = start + min(_MOST_PER_BLOCK, share)
        yield tasks[start:end]
        start = end


def _results(function: Callable[[dict], dict], block: str) -> Iterator[pa.Table]:
    for task in json.loads(block):
        yield pa.table({"result": [json.dumps(_attempt(function, task))]})


def _attempt(function: Callable[[dict], dict], task: dict) -> dict:
    """The result of a task under `done`, or the arguments of its OSError under `failed`."""
    try:
        return {"done": function(task)}
    except OSError as error:
        text = f"{error.strerror or error} on {socket.gethostname()}"
        text += f": {error.filename}" if error.filename else ""
        return {"failed": [text] if error.errno is None else [error.errno, text]}
    except ValueError as error:
        return {"wrong": str(error)}
