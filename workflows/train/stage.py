"""What a stage trains, what it freezes and how its learning rate runs: one place, logged by name and size."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from workflows.configs.train import PARTS, StageRecipe

NO_DECAY_SUFFIXES = ("A_log", "dt_bias", "D")


@dataclass(frozen=True)
class PartSize:
    """One part of the model in one stage."""

    name: str
    parameters: int
    trains: bool


def freeze(model: nn.Module, stage: StageRecipe) -> list[PartSize]:
    """Set requires_grad of every parameter by the stage's `trains`, and say what came of it."""
    sizes = []
    for name in PARTS:
        part = getattr(model, name)
        trains = name in stage.trains
        part.requires_grad_(trains)
        sizes.append(PartSize(name, sum(p.numel() for p in part.parameters()), trains))
    return sizes


def describe(stage: StageRecipe, sizes: list[PartSize]) -> str:
    """One line: stage connector: trains connector (275,990); frozen vision (..), language_model (..); saves all."""
    trained = ", ".join(f"{s.name} ({s.parameters:,})" for s in sizes if s.trains)
    frozen = ", ".join(f"{s.name} ({s.parameters:,})" for s in sizes if not s.trains) or "nothing"
    return f"stage {stage.name}: trains {trained}; frozen: {frozen}; saves the whole model"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups: decay on matrices only, none on biases, norms, A_log, dt_bias and D."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.endswith(NO_DECAY_SUFFIXES)
            (plain if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def total_steps(stage: StageRecipe, rows: int) -> int:
    """Optimizer steps of a stage over a data set of so many rows."""
    return stage.steps or max(1, round(stage.epochs * (rows // stage.batch_rows)))


def schedule(stage: StageRecipe, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then cosine to zero."""
    warm = math.ceil(stage.warmup * steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
