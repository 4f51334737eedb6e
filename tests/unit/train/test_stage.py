"""What a stage trains and freezes, its parameter groups and its schedule."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.tiny import tiny_model
from workflows.recipe.train import StageRecipe, TrainRecipe
from workflows.train.optim import ClippedAdamW, adamw_options, deepspeed_config, parameter_groups, schedule
from workflows.train.stage import describe, freeze, total_steps


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision = nn.Linear(2, 3)
        self.connector = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.language_model = nn.Linear(4, 5)
        self.language_model.A_log = nn.Parameter(torch.zeros(2, 2))


def stage(**changes) -> StageRecipe:
    return StageRecipe(
        **{"name": "s", "trains": ["connector"], "steps": 10, "learning_rate": 1.0, "batch_rows": 4, **changes}
    )


def test_only_the_named_parts_train():
    model = Model()
    text = describe(stage(), freeze(model, stage()))
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"connector"}
    assert text == "stage s: trains connector (24); frozen: vision (9), language_model (29); saves the whole model"


def test_a_later_stage_thaws_what_an_earlier_one_froze():
    model = Model()
    freeze(model, stage())
    freeze(model, stage(trains=["language_model"]))
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"language_model"}


def test_biases_norms_and_state_space_parameters_are_never_decayed():
    model = Model()
    freeze(model, stage(trains=["connector", "language_model"]))
    groups = parameter_groups(model, stage(trains=["connector", "language_model"], weight_decay=0.1))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model.connector[0].weight), id(model.language_model.weight)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert sum(len(group["params"]) for group in groups) == 7


def test_every_part_can_have_a_learning_rate_of_its_own():
    model, recipe = Model(), stage(trains=["vision", "connector"], learning_rates={"vision": 0.01})
    freeze(model, recipe)
    rates = {group["part"]: group["lr"] for group in parameter_groups(model, recipe)}
    assert rates == {"vision": 0.01, "connector": 1.0}
    optimizer = torch.optim.SGD(parameter_groups(model, recipe))
    schedule(recipe, optimizer, 100)
    now = {group["part"]: group["lr"] for group in optimizer.param_groups}
    assert now["vision"] == pytest.approx(now["connector"] * 0.01)


def test_plain_data_parallel_training_clips_measures_and_refuses_as_zero_does():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = ClippedAdamW([{"params": [weight]}], clip=1.0, lr=0.1)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert float(optimizer._global_grad_norm) == pytest.approx(5.0)
    assert weight.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    before = weight.detach().clone()
    weight.grad = torch.tensor([float("nan"), 1.0])
    optimizer.step()
    assert optimizer.overflow
    assert torch.equal(weight, before)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    recipe = stage(steps=100, warmup=0.1)
    scheduler, rates = schedule(recipe, optimizer, 100), []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] > 0
    assert max(rates) == rates[10] == 1.0
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert rates[-1] < 0.01


@pytest.mark.parametrize(("length", "expected"), [({"steps": 7}, 7), ({"steps": None, "epochs": 2.5}, 25)])
def test_steps_come_from_steps_or_epochs(length, expected):
    assert total_steps(stage(**length), rows=43) == expected


def test_accumulation_fills_the_batch():
    train = TrainRecipe(workers=2, stages=[stage(batch_rows=12, micro_batch_rows=2)])
    assert deepspeed_config(train.stages[0], train, 2)["gradient_accumulation_steps"] == 3


@pytest.mark.parametrize(("gpus", "offload", "fused"), [(0, "none", False), (1, "none", True), (1, "optimizer", False)])
def test_on_gpus_communication_overlaps_and_the_optimizer_is_one_kernel(gpus, offload, fused):
    """On a CPU both stay as they were, so that losses and weights do."""
    train = TrainRecipe(workers=1, gpus_per_worker=gpus, offload=offload, stages=[stage()])
    assert deepspeed_config(train.stages[0], train, 1)["zero_optimization"]["overlap_comm"] is bool(gpus)
    assert adamw_options(train.stages[0], train) == {"betas": (0.9, 0.98), "eps": 1e-8, "fused": fused}


@pytest.mark.parametrize(("offload", "zero_stage"), [("optimizer", 0), ("parameters", 2)])
def test_offload_needs_a_zero_stage_that_shards_what_it_moves(offload, zero_stage):
    with pytest.raises(ValueError, match=f"offload = {offload} needs zero_stage"):
        TrainRecipe(workers=1, offload=offload, zero_stage=zero_stage, stages=[stage()])


def test_in_bf16_all_linear_weights_travel_as_bf16_and_the_state_parameters_do_not():
    """Decided by DeepSpeed's own marks: it looks at the exact class of a module."""
    from deepspeed.runtime.torch_autocast import get_comm_dtype, init_autocast_params

    model = tiny_model()
    train = TrainRecipe(workers=1, precision="bf16", stages=[stage()])
    named = deepspeed_config(train.stages[0], train, 1)["torch_autocast"]["lower_precision_safe_modules"]
    init_autocast_params(SimpleNamespace(module=model, zero_quantized_weights=lambda: False), torch.bfloat16, named)
    travels = {name: get_comm_dtype(parameter) for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert get_comm_dtype(module.weight) == torch.bfloat16, name
    for name, dtype in travels.items():
        if name.endswith(("A_log", "dt_bias", ".D")):
            assert dtype == torch.float32, name
