"""What a stage trains, what it freezes and how its learning rate runs: one place, logged by name and size."""

from dataclasses import dataclass

from torch import nn

from workflows.recipe.train import PARTS, StageRecipe


@dataclass(frozen=True)
class PartSize:
    """One part of the model in one stage."""

    name: str
    parameters: int
    trains: bool
    adapters: int = 0
    """Parameters of low-rank adapters, which then train in place of the part's own."""


def freeze(model: nn.Module, stage: StageRecipe) -> list[PartSize]:
    """Set requires_grad of every parameter by the stage's `trains`, and say what came of it.

    With `lora` the language model gets its adapters here (workflows/train/lora.py).
    """
    sizes = []
    for name in PARTS:
        part = getattr(model, name)
        trains = name in stage.trains
        part.requires_grad_(trains)
        parameters, adapters = sum(p.numel() for p in part.parameters()), 0
        if trains and stage.lora and name == "language_model":
            from workflows.train.lora import adapt  # peft is needed by such stages alone

            adapters = adapt(part, stage.lora)
        sizes.append(PartSize(name, parameters, trains, adapters))
    return sizes


def describe(stage: StageRecipe, sizes: list[PartSize]) -> str:
    """One line: stage connector: trains connector (275,990); frozen vision (..), language_model (..); saves all."""
    trained = ", ".join(
        f"{s.name} ({s.adapters:,} in adapters on {s.parameters:,})" if s.adapters else f"{s.name} ({s.parameters:,})"
        for s in sizes
        if s.trains
    )
    frozen = ", ".join(f"{s.name} ({s.parameters:,})" for s in sizes if not s.trains) or "nothing"
    return f"stage {stage.name}: trains {trained}; frozen: {frozen}; saves the whole model"


def total_steps(stage: StageRecipe, rows: int) -> int:
    """Optimizer steps of a stage over a data set of so many rows."""
    return stage.steps or max(1, round(stage.epochs * (rows // stage.batch_rows)))
