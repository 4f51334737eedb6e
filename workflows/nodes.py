"""What the cluster's nodes must have before a workflow starts: the storage folder and the packages.

A folder that only the head sees is a common mistake on a cluster, and shows hours later as a missing file. So every
node is asked to read a word that the driver wrote into the storage folder, and to write one back.
"""

import importlib.util
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.storage import delete, exists, join, read_bytes, shown, write_atomic
from workflows.configs.evaluate import EvaluateRecipe
from workflows.errors import UsageError, WorkflowError
from workflows.storage import is_remote, place

_NEEDED = ("torch", "transformers", "timm", "pyarrow", "deepspeed", "mlflow", "safetensors")
_WAIT = 180.0
"""Seconds for the nodes to answer; starting a process there takes a few."""


@dataclass(frozen=True)
class Answer:
    """What one node sees."""

    host: str
    problem: str


def check_nodes(storage: Path) -> None:
    """See that every node that can work sees the storage folder and has the packages.

    Raises:
        WorkflowError: says which node lacks what.
    """
    own = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != own]
    if workers := [node for node in nodes if node["Resources"].get("CPU", 0) > 0]:
        _check_storage(workers, place(storage))


def check_this_node(wanted: EvaluateRecipe) -> None:
    """See that this node can score a model by itself, as it must where storage is an object store.

    Raises:
        UsageError: it lacks CPUs or GPUs.
    """
    own = ray.get_runtime_context().get_node_id()
    (here,) = [node["Resources"] for node in ray.nodes() if node["NodeID"] == own]
    needs = {"CPU": wanted.cpus_per_worker, "GPU": wanted.gpus_per_worker}
    lacking = [f"{needs[name]:g} {name}s" for name in needs if here.get(name, 0) < needs[name]]
    if lacking:
        raise UsageError(
            "with storage in an object store the node that runs the workflow evaluates by itself, and it has not the "
            f"{' and '.join(lacking)} of evaluate.cpus_per_worker and gpus_per_worker: use `mlmamba train` and then "
            "evaluate the model elsewhere, or a storage folder that all nodes share"
        )


@contextmanager
def where_files_meet(storage: Path) -> Iterator[None]:
    """Ray Data's tasks of the block run where files that they write come together: with storage in an object store on
    the node of this process, else anywhere."""
    if not is_remote(place(storage)):
        yield
        return
    context, own = DataContext.get_current(), ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(own, soft=False)
    before = context.scheduling_strategy, context.scheduling_strategy_large_args
    _schedule(context, here, here)
    try:
        yield
    finally:
        _schedule(context, *before)


def _schedule(context: DataContext, strategy, strategy_large_args) -> None:
    with (
        warnings.catch_warnings()
    ):  # from 2027 on Ray wants it said at every map instead, which is not ours to say here
        warnings.simplefilter("ignore")
        context.scheduling_strategy = strategy
        context.scheduling_strategy_large_args = strategy_large_args


def _check_storage(nodes: list[dict], storage: str) -> None:
    word = uuid.uuid4().hex
    name = f".seen-{word}"
    file = join(storage, name)
    write_atomic(file, word.encode())
    try:
        asked = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[_look.options(scheduling_strategy=there).remote(storage, name, word)] = node
        ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_WAIT)
        problems = [f"{asked[each]['NodeManagerHostname']} did not answer within {_WAIT:.0f} s" for each in silent]
        for each in ready:
            try:
                answer = ray.get(each)
            except ray.exceptions.RayError as error:
                host, last = asked[each]["NodeManagerHostname"], str(error).strip().splitlines()[-1]
                problems.append(f"{host} cannot run this code ({last}): start with `mlmamba submit`, which ships it")
                continue
            if answer.problem:
                problems.append(f"{answer.host} {answer.problem}")
            elif not exists(join(storage, f"{name}.{asked[each]['NodeID']}")):
                where = shown(storage)
                problems.append(f"{answer.host} has another folder at {where}: what it wrote there is not seen here")
    finally:
        for left in (name, *(f"{name}.{node['NodeID']}" for node in nodes)):
            with suppress(OSError):
                delete(join(storage, left))
    if problems:
        wanted = (
            "need credentials for the object store in --storage"
            if is_remote(storage)
            else "must share the folder in --storage, such as a network file system"
        )
        raise WorkflowError(
            f"{len(problems)} of {len(nodes)} other nodes cannot take part: {'; '.join(sorted(problems))}. All nodes "
            f"{wanted}, and need the packages"
        )


@ray.remote(num_cpus=0, max_retries=1)
def _look(storage: str, name: str, word: str) -> Answer:
    """Runs on a node: read the driver's word and leave an answer."""
    host, where = ray.util.get_node_ip_address(), shown(storage)
    try:
        seen = read_bytes(join(storage, name)).decode()
        write_atomic(join(storage, f"{name}.{ray.get_runtime_context().get_node_id()}"), word.encode())
    except FileNotFoundError:
        return Answer(host, f"does not see {where}, or has another folder there")
    except OSError as error:
        return Answer(host, f"cannot write to {where} ({error.strerror or error})")
    if seen != word:
        return Answer(host, f"sees something else in {where}")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return Answer(host, f"lacks the packages {', '.join(missing)}" if missing else "")
