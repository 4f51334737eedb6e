"""The DeepSpeed engine of a stage: its config, its optimizer, the parameter groups and the learning rate schedule."""

import math
import sys

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.torch_autocast import get_default_autocast_lower_precision_modules
from torch import nn

from workflows.recipe.train import StageRecipe, TrainRecipe
from workflows.train.saver import MemoryEngine
from workflows.train.stage import GPU_BUCKET, accumulation

# On a CPU DeepSpeed would compile this extension on first use: it takes a minute and a compiler, and only inference
# uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer, which it looks at when it is given another, without torch's compiler: that
    takes most of a second to import, for functions that are compiled when they are first called."""
    if "deepspeed.runtime.zero.muon.original_muon" in sys.modules:
        return
    compiler = torch.compile
    torch.compile = lambda function=None, **options: function if function else lambda decorated: decorated
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = compiler


_import_muon()
BF16_MODULES = ["mlmamba.ops.linear.Linear", *get_default_autocast_lower_precision_modules()]
"""Classes whose parameters travel between workers as bf16. DeepSpeed compares classes exactly, so that a subclass of
torch's Linear that is not named here would travel as float32."""
NO_DECAY_SUFFIXES = ("A_log", "dt_bias", "D")
"""Parameters of the state space that get no weight decay, though some are matrices."""


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips and measures the gradient as ZeRO's optimizers do, for plain data parallel training.

    Without ZeRO, DeepSpeed clips without keeping the norm, and applies a gradient that is not finite. It reads the norm
    and the skipped step from the attributes `_global_grad_norm` and `overflow`.
    """

    def __init__(self, groups: list[dict], clip: float, **options):
        super().__init__(groups, **options)
        self._clip = clip or math.inf
        self._global_grad_norm = 0.0
        self.overflow = False

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = nn.utils.clip_grad_norm_(parameters, self._clip)
        self.overflow = not bool(torch.isfinite(self._global_grad_norm))
        return None if self.overflow else super().step(closure)


def start_engine(model: nn.Module, stage: StageRecipe, train: TrainRecipe, steps: int):
    """Build the DeepSpeed engine of a model whose parts are already frozen for the stage."""
    groups, options = parameter_groups(model, stage), adamw_options(stage, train)
    if train.zero_stage:
        optimizer = torch.optim.AdamW(groups, **options)
    else:
        optimizer = ClippedAdamW(groups, stage.clip, **options)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule(stage, optimizer, steps),
        config=deepspeed_config(stage, train, dist.get_world_size()),
    )
    MemoryEngine().attach(engine)
    return engine


def adamw_options(stage: StageRecipe, train: TrainRecipe) -> dict:
    """Return AdamW's options of a stage.

    On a GPU it is fused, one kernel for all parameters. On a CPU that would give other last bits, and an offloaded
    optimizer is on one.
    """
    fused = bool(train.gpus_per_worker) and train.offload == "none"
    return {"betas": stage.betas, "eps": stage.eps, "fused": fused}


def deepspeed_config(stage: StageRecipe, train: TrainRecipe, world: int) -> dict:
    """Return DeepSpeed's JSON config for a stage and a number of workers, without an optimizer: `start_engine` passes
    its own.

    bf16 means autocast over float32 weights, because DeepSpeed's own bf16 mode would also round A_log, dt_bias and D.
    On GPUs gradients are reduced while the backward pass goes on; on a CPU there is nothing to do that on.
    """
    zero: dict = {"stage": train.zero_stage, "overlap_comm": bool(train.gpus_per_worker)}
    if train.gpus_per_worker:
        zero["reduce_bucket_size"] = GPU_BUCKET
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": stage.micro_batch_rows,
        "gradient_accumulation_steps": accumulation(stage, world),
        "gradient_clipping": stage.clip if train.zero_stage else 0.0,  # without ZeRO, ClippedAdamW clips
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": train.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": BF16_MODULES,
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def parameter_groups(model: nn.Module, stage: StageRecipe) -> list[dict]:
    """Return AdamW's groups: up to two for each part that trains, with its learning rate, one of them without decay.

    Only matrices decay; biases, norms, A_log, dt_bias and D do not. The key `part` names the part of a group.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.endswith(NO_DECAY_SUFFIXES)
            groups.setdefault((name.split(".")[0], exempt), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": stage.learning_rates.get(part, stage.learning_rate),
            "weight_decay": 0.0 if exempt else stage.weight_decay,
            "part": part,
        }
        for (part, exempt), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def schedule(stage: StageRecipe, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Schedule every group's learning rate: linear warm-up to its own peak, then cosine to zero."""
    warm = math.ceil(stage.warmup * steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
