"""Checks before any work: what would otherwise fail a workflow hours after its start.

    check_weights     the weights that the recipe names are there and of its size
    check_workers     the cluster can hold the training's workers
    check_nodes       every node sees the storage and has the packages
    check_evaluation  this node can score the model, where storage is an object store
    check_room        the storage has room for models, checkpoints and data
    check_images      the folders that sources name for their images are there
    check_stages      the prepared data has the rows and splits that the stages want

Storage that only the head sees is a common mistake on a cluster. So every node is asked to read a word that the driver
wrote there, and to write one back.
"""

import importlib.util
import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import ray
from huggingface_hub import hf_hub_download
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlmamba.convert.families import FAMILIES, from_family
from pipelines import storage as files
from pipelines.config import DataConfig
from pipelines.manifest import MANIFEST_FILE, Manifest
from pipelines.sources import open_source
from workflows.errors import UsageError, WorkflowError
from workflows.recipe.evaluate import EvaluateRecipe
from workflows.recipe.model import ModelRecipe
from workflows.recipe.schema import Recipe
from workflows.recipe.train import TrainRecipe
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout
from workflows.storage.remote import CACHE

_NEEDED = ("torch", "transformers", "timm", "pyarrow", "deepspeed", "mlflow", "safetensors")
_WAIT = 180.0
"""Seconds for the nodes to answer; starting a process there takes a few."""


@dataclass(frozen=True)
class Answer:
    """What one node sees."""

    host: str
    problem: str
    """What it lacks, for people; "" when nothing."""


def check_nodes(storage: Folder) -> None:
    """See that every node that can work sees the storage folder and has the packages.

    Raises:
        WorkflowError: says which node lacks what.
    """
    own = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != own]
    if workers := [node for node in nodes if node["Resources"].get("CPU", 0) > 0]:
        _ask_nodes(workers, storage)


def check_evaluation(wanted: EvaluateRecipe) -> None:
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
def tasks_where_files_meet(storage: Folder) -> Iterator[None]:
    """Run Ray Data's tasks of the block where the files that they write come together: on the node of this process if
    storage is an object store, else anywhere."""
    if not storage.remote:
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


def _ask_nodes(nodes: list[dict], storage: Folder) -> None:
    """Raise WorkflowError unless every node reads the driver's word in the storage and writes one back."""
    word = uuid.uuid4().hex
    name = f".seen-{word}"
    storage.write(name, word)
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
            elif not (storage / f"{name}.{asked[each]['NodeID']}").exists():
                problems.append(f"{answer.host} has another folder at {storage}: what it wrote there is not seen here")
    finally:
        for left in (name, *(f"{name}.{node['NodeID']}" for node in nodes)):
            with suppress(OSError):
                files.delete((storage / left).uri)
    if problems:
        wanted = (
            "need credentials for the object store in --storage"
            if storage.remote
            else "must share the folder in --storage, such as a network file system"
        )
        raise WorkflowError(
            f"{len(problems)} of {len(nodes)} other nodes cannot take part: {'; '.join(sorted(problems))}. All nodes "
            f"{wanted}, and need the packages"
        )


@ray.remote(num_cpus=0, max_retries=1)
def _look(storage: Folder, name: str, word: str) -> Answer:
    """Runs on a node: read the driver's word and leave an answer."""
    host = ray.util.get_node_ip_address()
    try:
        seen = storage.read(name).decode()
        storage.write(f"{name}.{ray.get_runtime_context().get_node_id()}", word)
    except FileNotFoundError:
        return Answer(host, f"does not see {storage}, or has another folder there")
    except OSError as error:
        return Answer(host, f"cannot write to {storage} ({error.strerror or error})")
    if seen != word:
        return Answer(host, f"sees something else in {storage}")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return Answer(host, f"lacks the packages {', '.join(missing)}" if missing else "")


_TOWER_FROM_TIMM = ("hub", "random")


def check_weights(model: ModelRecipe) -> None:
    """Raise UsageError when a file, folder or hub name is not there, or the language model has another size.

    Of a model on the hub only its config.json is fetched.
    """
    from workflows.train.initial import locate

    for i, tower in enumerate(model.vision.towers):
        if tower.weights not in _TOWER_FROM_TIMM and not Path(locate(tower.weights)).exists():
            raise UsageError(f"model.vision.towers.{i}.weights: there is no file {tower.weights}")
    weights = model.text.weights
    if weights == "random":
        return
    file, config = _config(weights)
    own = config.get("text_config", config)
    if config.get("model_type") in FAMILIES:
        try:
            own = from_family(file).to_dict()
        except ValueError as error:
            raise UsageError(f"model.text.weights: {weights}: {error}") from error
    for name, other in (("hidden_size", "d_model"), ("num_hidden_layers", "n_layer")):
        found, wanted = own.get(name, own.get(other)), getattr(model.text, name)
        if found is None:
            raise UsageError(
                f"model.text.weights: {weights} is no Mamba-2 language model: it has no {name} and no {other}"
            )
        if found != wanted:
            raise UsageError(
                f"model.text: {weights} has {name} {found}, the recipe says {wanted}; set it to the checkpoint's, or "
                "model.preset to its size"
            )


def _config(weights: str) -> tuple[Path, dict]:
    """config.json of a folder or hub name, and what is in it."""
    try:
        local = Path(weights).is_dir() or Path(weights).is_absolute() or len(Path(weights).parts) > 2
        file = Path(weights) / "config.json" if local else Path(hf_hub_download(weights, "config.json"))
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"model.text.weights: cannot load {weights}: give a folder with config.json, or the name of a model that "
            f"the hub has and this machine reaches ({reason[0]})"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"model.text.weights: {weights}: config.json is not a mapping")
    return file, content


def check_room(recipe: Recipe, layout: Layout, note: Callable[[str], None]) -> None:
    """Raise WorkflowError when not even the models fit; tell when checkpoints and data may not.

    Only of a workflow that has not begun: of another, part of it is there. An object store has room, its copies on this
    machine's disk need some.
    """
    from workflows.plan.data import count_rows
    from workflows.plan.train import GIB, disk_of, meta_model
    from workflows.train.initial import image_tokens

    if layout.initial.local.exists():
        return
    remote, disk_folder = layout.storage.remote, layout.storage.local
    free = shutil.disk_usage(disk_folder).free
    _, sizes, _ = meta_model(recipe, layout)
    tokens, data = image_tokens(recipe.model), {}
    for stage in recipe.train.stages:
        folder = layout.data[stage.name]
        data[folder] = count_rows(recipe.data_of(stage), folder.local, tokens, {}).bytes or 0
        data[folder] *= not (remote or (folder / MANIFEST_FILE).exists())  # else it takes no room here, or no more
    disk = disk_of(recipe.train, sizes, data)
    certain, likely = disk["models"] + disk["registered"], disk["total"]
    text = f"{disk_folder} has {free / GIB:.1f} GiB free"
    if free < certain:
        raise WorkflowError(
            f"{text}, the models of this recipe alone take {certain / GIB:.1f} GiB: make room, or choose another "
            f"{CACHE if remote else '--storage'} (`mlmamba train RECIPE --dry-run` lists what takes how much)"
        )
    if free < likely:
        note(f"{text}, this workflow may take {likely / GIB:.1f} GiB (`--dry-run` lists what)")


def check_workers(recipe: Recipe) -> None:
    """Raise WorkflowError when the cluster that Ray is connected to can never hold the workers."""
    check_fit(recipe.train, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def check_fit(train: TrainRecipe, nodes: list[dict[str, float]]) -> None:
    """Raise WorkflowError when nodes with these resources can never hold the workers."""
    each = {"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker}
    for kind, amount in each.items():
        there = sum(node.get(kind, 0) for node in nodes)
        if train.least_workers * amount > there:
            raise WorkflowError(
                f"training wants {train.least_workers} workers x {amount} {kind}, the cluster has {there:g} {kind}: "
                "lower train.workers, or add nodes"
            )
    fit = sum(min(int(node.get(kind, 0) // amount) for kind, amount in each.items() if amount) for node in nodes)
    if fit < train.least_workers:
        wants = " and ".join(f"{amount} {kind}" for kind, amount in each.items() if amount)
        raise WorkflowError(
            f"training wants {train.least_workers} workers with {wants} each, the cluster's {len(nodes)} nodes hold "
            f"{fit} of them (a worker does not span nodes): lower train.cpus_per_worker or train.workers, or add nodes"
        )


_FIRST = 5  # records of a source whose images are tried


def check_images(data: DataConfig) -> None:
    """Raise WorkflowError when the folder or zip of a source's images is not there.

    Where it is not, the first records decide: their images may be named by absolute paths or be in the text itself.
    """
    for split in ("train", "validation", "test"):
        for number, config in enumerate(getattr(data, split)):
            root = getattr(config, "images", None)
            if root is None or files.exists(root):
                continue
            source = open_source(config)
            shown = [record.images[0] for record in islice(source.records(), _FIRST) if record.images]
            if shown and not any(_readable(source, location) for location in shown):
                raise WorkflowError(
                    f"data.{split}.{number}.images: there is no folder or zip {files.shown(root)}, and the first "
                    f"records want images from it ({shown[0]}); correct the path, which is taken from the folder that "
                    "the command runs in"
                )


def _readable(source, location: str) -> bool:
    try:
        return bool(source.read_image(location))
    except (OSError, ValueError):
        return False


def check_stages(recipe: Recipe, manifests: dict[str, Manifest]) -> None:
    """Raise WorkflowError when a stage cannot be trained on its data; `manifests` are by stage."""
    train = recipe.train
    for stage in train.stages:
        splits = manifests[stage.name].splits
        rows = splits["train"].rows
        if rows < stage.batch_rows:
            raise WorkflowError(
                f"stage {stage.name}: one step takes {stage.batch_rows} packed rows, its data set has {rows}: lower "
                "batch_rows, or prepare more data"
            )
        for field in ("validate_every", "sample_every"):
            if getattr(train, field) and "validation" not in splits:
                raise WorkflowError(
                    f"train.{field} is set, but the data of stage {stage.name} has no validation split: give "
                    f"data.validation sources, or a source of data.train `validation: 0.1`, or take train.{field} out"
                )
