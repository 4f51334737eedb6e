"""Low-rank adapters (LoRA, arXiv 2106.09685) on the language model, through peft, for the length of one stage."""

import contextlib

import deepspeed
import torch
from torch import nn

from workflows.recipe.train import LoraRecipe
from workflows.train.job import StageError

ADAPTER = "default"  # peft's name for an adapter that was given none


def adapt(language_model: nn.Module, recipe: LoraRecipe) -> int:
    """Put adapters on the language model's linear layers; they alone train. Returns their number of parameters.

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
    """The layers that carry adapters, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


def plain_name(name: str) -> str | None:
    """Name in the plain model of a tensor of the adapted one; None for one of an adapter."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def merge(layer: nn.Module, weight: torch.Tensor, sharded: bool) -> torch.Tensor:
    """The weight that does what the layer and its adapter do: W + alpha / rank * B A, float32 on the CPU.

    Args:
        weight: the layer's own, (out, in).
        sharded: under ZeRO-3 the adapter is gathered first, a collective call.
    """
    factors = [p for name, p in layer.named_parameters() if "lora_" in name]
    with deepspeed.zero.GatheredParameters(factors) if sharded else contextlib.nullcontext():
        return weight + layer.get_delta_weight(ADAPTER).detach().float().cpu()
