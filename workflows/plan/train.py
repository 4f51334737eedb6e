"""The plan of a training: rows, steps, tokens, parameters, memory, disk and operations of every stage."""

import math
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlmamba.connector import build_connector
from mlmamba.modeling import MLMambaForConditionalGeneration
from workflows.errors import UsageError
from workflows.plan.cost import Forward, forward_flops, halved, image_shape, sent, training_flops
from workflows.plan.data import Rows, check_labels, count_rows, vocabulary_of
from workflows.plan.memory import STAGES, activations, model_states, saved_bytes
from workflows.recipe.schema import Recipe
from workflows.recipe.train import AUTO, PARTS, StageRecipe, TrainRecipe
from workflows.storage.folder import Folder
from workflows.storage.layout import Layout, layout_of
from workflows.train.features import impossible, pays
from workflows.train.initial import image_tokens, model_config
from workflows.train.stage import total_steps

GIB = 2**30
BYTES_OF_A_CHECKPOINT = 16
"""Per trained parameter: weights, the optimizer's copy of them, two moments, all float32."""


@dataclass(frozen=True)
class Machine:
    """What the plan reckons with for one worker."""

    peak: float | None
    """Operations per second at best, of the precision that is used."""
    mfu: float
    """Share of the peak that training reaches (model operations over time; Chowdhery et al. 2022, arXiv 2204.02311)."""
    memory: float | None
    """Bytes of one GPU."""
    kernels: bool
    """The scan runs on mamba_ssm's kernels."""


A100 = (312e12, 80 * GIB)
"""Peak in bf16 without sparsity, and memory, of the paper's GPU (NVIDIA's data sheet)."""


def machine_of(recipe: Recipe, peak_tflops: float | None, mfu: float, gib: float | None) -> Machine:
    """The paper's GPU where the recipe has GPUs and nothing else is said; of a CPU nothing is presumed.

    Raises:
        UsageError: a number makes no sense.
    """
    if not 0 < mfu <= 1 or (peak_tflops is not None and peak_tflops <= 0) or (gib is not None and gib <= 0):
        raise UsageError(f"--mfu {mfu} must be above 0 and at most 1, --peak-tflops and --gpu-memory above 0")
    peak, memory = A100 if recipe.train.gpus_per_worker else (None, None)
    return Machine(
        1e12 * peak_tflops if peak_tflops else peak,
        mfu,
        GIB * gib if gib else memory,
        kernels=bool(recipe.train.gpus_per_worker),
    )


def plan_training(recipe: Recipe, storage: Folder, given: dict[str, tuple[int, int | None]], machine: Machine) -> dict:
    """Everything that is known before anything starts, as JSON-able data.

    Args:
        given: counts by source, see `count_rows`.

    Raises:
        UsageError: the model cannot be built.
    """
    check_labels(given, [recipe.data_of(stage) for stage in recipe.train.stages])
    tokens = image_tokens(recipe.model)
    layout = layout_of(recipe, storage, tokens)
    model, sizes, vocabulary_from = meta_model(recipe, layout)
    stages = []
    for stage in recipe.train.stages:
        rows = count_rows(recipe.data_of(stage), layout.data[stage.name].local, tokens, given)
        forward = forward_flops(model, rows.image_tokens or model.image_layout.most)
        planned = _stage(recipe, stage, rows, sizes, forward, model, machine)
        stages.append(planned | {"features": _features(stage, recipe.train, rows, model, layout.data[stage.name])})
    data = {layout.data[stage["stage"]]: stage["rows"]["bytes"] for stage in stages}
    features = {layout.data[stage["stage"]]: stage["features"]["bytes"] for stage in stages if stage["features"]}
    return {
        "recipe": recipe.name,
        "parameters": {**sizes, "total": sum(sizes.values())},
        "vocabulary": {"rows": model.config.text_config.vocab_size, "from": vocabulary_from},
        "tokens_per_image": tokens,
        "workers": recipe.train.most_workers,
        "reckoned_with": _reckoned(recipe.train, machine),
        "zero_stage": recipe.train.zero_stage,
        "stages": stages,
        "disk": disk_of(recipe.train, sizes, data, sum(features.values())),
        "hours": _sum(stage["hours"] for stage in stages),
    }


def _stage(
    recipe: Recipe, stage: StageRecipe, rows: Rows, sizes: dict, forward: Forward, model, machine: Machine
) -> dict:
    train, data = recipe.train, recipe.data_of(stage)
    trained, at_once = trained_of(stage, sizes), train.micro_batches(stage)
    plan = {
        "stage": stage.name,
        "trains": list(stage.trains),
        "trained": trained,
        "frozen": sum(sizes.values()) - trained,
        "learning_rate": stage.learning_rate,
        "weight_decay": stage.weight_decay,
        "batch_rows": stage.batch_rows,
        "micro_batch_rows": at_once[-1],
        "micro_batch_rows_measured": stage.micro_batch_rows == AUTO,
        "accumulation": stage.batch_rows // (train.most_workers * at_once[-1]),
        "rows": rows.as_dict(),
        "steps": stage.steps,
        "batch_samples": None,
        "positions": None,
        "samples": None,
        "flops": None,
        "hardware_flops": None,
        "hours": None,
        "checkpoint_bytes": BYTES_OF_A_CHECKPOINT * trained,
        "memory": None,
        "communication": None,
    }
    if stage.lora:
        plan["note"] = "the adapters of LoRA are not counted; they are a few million parameters"
    if rows.rows is None:
        return plan
    steps = total_steps(stage, rows.rows)
    per_row = {name: getattr(rows, name) / rows.rows for name in ("samples", "images", "loss_tokens")}
    positions = steps * stage.batch_rows * data.max_tokens
    share = steps * stage.batch_rows / rows.rows
    counted = (round(count * share) for count in (rows.loss_tokens, rows.images))
    flops, hardware = training_flops(forward, stage.trains, positions, *counted, train.activation_checkpointing)
    plan |= {
        "steps": steps,
        "batch_samples": stage.batch_rows * per_row["samples"],
        "samples": round(rows.samples * share),
        "positions": positions,
        "flops": flops,
        "hardware_flops": hardware,
        "hours": flops / (machine.peak * machine.mfu * train.most_workers) / 3600 if machine.peak else None,
        "memory": _memory(train, stage, data.max_tokens, per_row, rows.image_tokens, trained, sizes, model, machine),
        "communication": _communication(train, stage, plan["accumulation"], trained, sizes, model),
    }
    return plan


def _features(stage: StageRecipe, train: TrainRecipe, rows: Rows, model, data: Folder) -> dict | None:
    """What the kept features of the frozen encoder take, at most, or why none are; None where none are asked for, or
    nothing is known of the data."""
    if stage.keep_features == "never" or rows.rows is None:
        return None
    if why := impossible(model, data.uri, stage):
        return {"bytes": 0, "why_not": why}
    found = pays(model, stage, train, rows.rows, rows.images, data.local)
    why = found.why_not if stage.keep_features == "auto" else ""
    return {"bytes": 0 if why else found.bytes, "why_not": why}


def _communication(train: TrainRecipe, stage: StageRecipe, micro_batches: int, trained: int, sizes, model) -> list:
    """What a worker sends in a step, by ZeRO stage."""

    def size(parts) -> int:
        """Bytes of parts on the way."""
        return sum(4 * sizes[part] - 2 * _halved(train, model, part) for part in parts)

    # Gradients pass through the language model whatever trains, and through what stands behind a part that trains.
    first = min(PARTS.index(part) for part in stage.trains)
    trains = [part for part in stage.trains if not (stage.lora and part == "language_model")]
    figures = (train.most_workers, micro_batches, trained, size(trains), size(PARTS), size(PARTS[first:]))
    return [sent(number, *figures).as_dict() for number in STAGES]


def _halved(train: TrainRecipe, model, part: str) -> int:
    """Parameters of a part that travel as bf16."""
    return halved(getattr(model, part)) if train.precision == "bf16" else 0


def _memory(
    train: TrainRecipe,
    stage: StageRecipe,
    length: int,
    per_row: dict,
    image_tokens: int,
    trained: int,
    sizes: dict,
    model,
    machine: Machine,
) -> dict:
    """One worker's memory by ZeRO stage, and what the activations take."""
    half, rows = train.precision == "bf16", train.micro_batches(stage)[-1]
    images = math.ceil(rows * per_row["images"])
    kept = activations(
        model.config.text_config,
        rows * length,
        math.ceil(rows * per_row["loss_tokens"]),
        _connector_bytes(model, images, image_tokens, stage),
        half,
        machine.kernels,
    )
    found = {"with": kept.total(True), "without": kept.total(False), "loss": kept.loss, "connector": kept.connector}
    gpu = bool(train.gpus_per_worker)
    trains = [part for part in stage.trains if not (stage.lora and part == "language_model")]
    halves = sum(_halved(train, model, part) for part in trains)
    states = [
        model_states(
            sum(sizes.values()), trained, train.most_workers, number, train.offload if number else "none", halves, gpu
        )
        for number in STAGES
    ]
    used = found["with" if train.activation_checkpointing else "without"]
    return {
        "activations": found,
        "checkpointing": train.activation_checkpointing,
        "zero": [
            {
                **state.as_dict(),
                "with_activations": state.total + used,
                "fits": None if machine.memory is None else state.total + used <= machine.memory,
            }
            for state in states
        ],
    }


def _connector_bytes(model, images: int, image_tokens: int, stage: StageRecipe) -> int:
    """What autograd keeps of the connector for so many images, in float32: an upper bound for bf16."""
    if not {"connector", "vision"} & set(stage.trains):
        return 0
    ((height, width), squares), config = image_shape(model, image_tokens), model.config
    with FakeTensorMode():
        connector = build_connector(model.vision.channels, config.text_config.hidden_size, config.connector_config)
        features = torch.zeros(1, height * width, model.vision.channels)
        return round(images * squares * saved_bytes(connector, features, (height, width)))


def meta_model(recipe: Recipe, layout: Layout) -> tuple[MLMambaForConditionalGeneration, dict[str, int], str]:
    """The model without weights, its parameters by part, and where the size of its vocabulary comes from."""
    vocabulary, origin = vocabulary_of(recipe.data, layout.data[recipe.train.stages[0].name].local)
    with torch.device("meta"):
        model = MLMambaForConditionalGeneration(model_config(recipe, vocabulary))
    return model, {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in PARTS}, origin


def trained_of(stage: StageRecipe, sizes: dict[str, int]) -> int:
    """Parameters that a stage trains; the adapters of LoRA are not counted."""
    return sum(sizes[part] for part in stage.trains if not (stage.lora and part == "language_model"))


def disk_of(train: TrainRecipe, sizes: dict[str, int], data: dict[Folder, int | None], features: int = 0) -> dict:
    """Bytes in the storage folder: data, kept features, the model before and after each stage, checkpoints, the
    registered copy."""
    model = 4 * sum(sizes.values())
    largest = BYTES_OF_A_CHECKPOINT * max(trained_of(stage, sizes) for stage in train.stages)
    # The best step's weights, of which there may be one more for each checkpoint.
    kept = 4 * max((trained_of(stage, sizes) for stage in train.stages if stage.best), default=0)
    disk = {
        "data": None if None in data.values() else sum(data.values()),
        "features": features,
        "models": model * (len(train.stages) + 1),
        "checkpoints": (largest + kept) * (train.keep_checkpoints + 1),  # a new one is whole before an old one goes
        "registered": model,
    }
    return {**disk, "total": _sum(disk.values())}


def _reckoned(train: TrainRecipe, machine: Machine) -> str:
    scan = "mamba_ssm's kernels" if machine.kernels else "the torch path"
    parts = [train.precision, f"the scan on {scan}"]
    if machine.peak:
        parts.append(f"{machine.peak / 1e12:g} TFLOP/s per worker at {machine.mfu:.0%} use")
    if machine.memory:
        parts.append(f"{machine.memory / GIB:g} GiB")
    return ", ".join(parts)


def _sum(values) -> float | None:
    values = list(values)
    return None if None in values else sum(values)
