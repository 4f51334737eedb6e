"""What a stage trains and freezes, in words and numbers for the log, and how many steps it takes."""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from workflows.recipe.train import PARTS, LoraRecipe, StageRecipe
from workflows.train.job import StageError

GPU_BUCKET = 200_000_000
"""Elements of DeepSpeed's reduce bucket on a GPU. There are up to four: one a type, and one is filled while another is
reduced. The largest weight of the paper's model, its embedding, fits."""


@dataclass(frozen=True)
class PartSize:
    """Size of one part of the model, and whether the stage trains it."""

    name: str
    parameters: int
    trains: bool
    adapters: int = 0
    """Parameters of its low-rank adapters; where there are any, they train and the part's own do not."""


def freeze(model: nn.Module, stage: StageRecipe) -> list[PartSize]:
    """Set requires_grad of every parameter by the stage's `trains`. Returns the size of each part.

    With `lora` this also adds the language model's adapters.
    """
    sizes = []
    for name in PARTS:
        part = getattr(model, name)
        trains = name in stage.trains
        part.requires_grad_(trains)
        parameters, adapters = sum(p.numel() for p in part.parameters()), 0
        if trains and stage.lora and name == "language_model":
            adapters = adapt(part, stage.lora)
        sizes.append(PartSize(name, parameters, trains, adapters))
    return sizes


def describe(stage: StageRecipe, sizes: list[PartSize]) -> str:
    """Describe a stage in one line: stage NAME: trains PART (parameters); frozen: PART (parameters); what it saves."""
    trained = ", ".join(
        f"{s.name} ({s.adapters:,} in adapters on {s.parameters:,})" if s.adapters else f"{s.name} ({s.parameters:,})"
        for s in sizes
        if s.trains
    )
    frozen = ", ".join(f"{s.name} ({s.parameters:,})" for s in sizes if not s.trains) or "nothing"
    return f"stage {stage.name}: trains {trained}; frozen: {frozen}; saves the whole model"


def accumulation(stage: StageRecipe, world: int) -> int:
    """Micro batches that each of `world` workers runs in a step."""
    return -(-stage.batch_rows // (world * stage.micro_batch_rows))


def total_steps(stage: StageRecipe, rows: int) -> int:
    """Count the optimizer steps of a stage over a data set of `rows` rows."""
    return stage.steps or max(1, round(stage.epochs * (rows // stage.batch_rows)))


ADAPTER = "default"  # peft's name for an adapter without one


def adapt(language_model: nn.Module, recipe: LoraRecipe) -> int:
    """Add adapters to the language model's linear layers and train only them. Returns their number of parameters.

    Raises:
        StageError: peft is not installed, or `targets` matches no layer that it can adapt.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise StageError("a stage with lora needs peft, which is not installed: pip install peft") from error
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=recipe.targets
    )
    try:
        inject_adapter_in_model(config, language_model, adapter_name=ADAPTER)
    except ValueError as error:
        raise StageError(f"lora.targets = {recipe.targets!r}: {error}") from error
    return sum(p.numel() for p in language_model.parameters() if p.requires_grad)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


def plain_name(name: str) -> str | None:
    """Return the name that a tensor of the adapted model has in the plain model; None for an adapter's own tensor."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def merge(layer: nn.Module, weight: torch.Tensor, sharded: bool) -> torch.Tensor:
    """Merge a layer's adapter into its weight: W + alpha / rank * B A, float32 on the CPU.

    Args:
        weight: the layer's own, (out, in).
        sharded: the parameters are sharded (ZeRO-3): gather the adapter first, a collective call.
    """
    import deepspeed  # the driver, which reads this file for its steps, does without

    factors = [p for name, p in layer.named_parameters() if "lora_" in name]
    with deepspeed.zero.GatheredParameters(factors) if sharded else contextlib.nullcontext():
        return weight + layer.get_delta_weight(ADAPTER).detach().float().cpu()
