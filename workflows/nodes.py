"""What the cluster's nodes must have before a workflow starts: the storage folder and the packages.

A folder that only the head sees is a common mistake on a cluster, and shows hours later as a missing file. So every
node is asked to read a word that the driver wrote into the storage folder, and to write one back.
"""

import importlib.util
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workflows.errors import WorkflowError

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
        _check_storage(workers, storage)


def _check_storage(nodes: list[dict], storage: Path) -> None:
    word = uuid.uuid4().hex
    file = storage / f".seen-{word}"
    file.write_text(word)
    try:
        asked = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[_look.options(scheduling_strategy=there).remote(str(file), word)] = node
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
            elif not Path(f"{file}.{asked[each]['NodeID']}").exists():
                problems.append(f"{answer.host} has another folder at {storage}: what it wrote there is not seen here")
    finally:
        for left in storage.glob(f"{file.name}*"):
            with suppress(OSError):
                left.unlink()
    if problems:
        raise WorkflowError(
            f"{len(problems)} of {len(nodes)} other nodes cannot take part: {'; '.join(sorted(problems))}. --storage "
            "must be a folder that all nodes share, such as a network file system, and every node needs the packages"
        )


@ray.remote(num_cpus=0, max_retries=1)
def _look(file: str, word: str) -> Answer:
    """Runs on a node: read the driver's word and leave an answer."""
    host = ray.util.get_node_ip_address()
    try:
        seen = Path(file).read_text()
        Path(f"{file}.{ray.get_runtime_context().get_node_id()}").write_text(word)
    except FileNotFoundError:
        return Answer(host, f"does not see {os.path.dirname(file)}, or has another folder there")
    except OSError as error:
        return Answer(host, f"cannot write to {os.path.dirname(file)} ({error.strerror})")
    if seen != word:
        return Answer(host, f"sees something else in {os.path.dirname(file)}")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return Answer(host, f"lacks the packages {', '.join(missing)}" if missing else "")
