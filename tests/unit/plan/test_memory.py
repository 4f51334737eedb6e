"""Memory and operations of a training, against hand calculation and against what torch keeps and counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlmamba.mamba2 import Mamba2Block
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import preset
from workflows.plan.cost import block_flops, forward_flops, kind_flops, training_flops
from workflows.plan.memory import activations, block_bytes, kind_bytes, model_states, saved_bytes

HYBRID = {
    "layers": ["attention", "mlp", "both"],
    "num_hidden_layers": 3,
    "num_heads": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_head_dim": 32,
    "rope_theta": 1e4,
    "mlp_size": 192,
}


def text(width: int = 128, **changes):
    fields = {"hidden_size": width, "head_dim": 16, "state_size": 32, "chunk_size": 32, "num_hidden_layers": 2}
    return preset("130m", text={**fields, **changes}).text_config


def meta_model(name: str) -> MLMambaForConditionalGeneration:
    with torch.device("meta"):
        return MLMambaForConditionalGeneration(preset(name))


@pytest.mark.parametrize(
    ("zero_stage", "expected"),
    [
        # 1,000 parameters, 600 train, 4 workers; float32 everywhere. By hand from the table in memory.py.
        (0, (4000, 2400, 4800, 0)),
        (1, (4000, 2400, 4800 / 4 + 2400 / 4, 2400)),
        (2, (4000, 2400 / 4, 4800 / 4 + 2400 / 4, 2400)),
        (3, (4000 / 4, 2400 / 4, 4800 / 4, 2400 + 4000)),
    ],
)
def test_model_states_are_those_of_the_zero_paper_in_float32(zero_stage, expected):
    states = model_states(1000, 600, 4, zero_stage)
    assert (states.weights, states.gradients, states.optimizer, states.buffers) == expected
    assert states.total == sum(expected)


def test_buffers_stop_growing_at_deepspeeds_limits():
    states = model_states(20_000_000_000, 10_000_000_000, 8, 3)
    assert states.buffers == 4 * 500_000_000 + 4 * 1_000_000_000


def test_in_bf16_on_gpus_there_are_buckets_of_both_types_and_copies_of_the_weights():
    """1,000 parameters, 600 train, 500 of them travel as bf16; by hand. Buckets are of 2e8 elements whatever trains."""
    buffers = [model_states(1000, 600, 4, stage, halved=500, gpu=True).buffers for stage in range(4)]
    buckets = (2 + 4) * 200_000_000
    assert buffers == [2 * 500, 2 * buckets + 2 * 500, 2 * buckets + 2 * 500, buckets + 2 * 1000]


def test_offload_moves_what_is_sharded_to_main_memory():
    plain, optimizer = model_states(1000, 600, 4, 3), model_states(1000, 600, 4, 3, "optimizer")
    assert optimizer.on_cpu == plain.optimizer + plain.gradients
    assert optimizer.total == plain.weights + plain.buffers
    assert model_states(1000, 600, 4, 3, "parameters").weights == 0
    assert model_states(1000, 600, 4, 2, "parameters").weights == 4000  # only ZeRO 3 shards them


@pytest.mark.parametrize("changes", [{}, {"width": 256, "head_dim": 64, "state_size": 128}, {"chunk_size": 64}])
def test_a_block_keeps_what_autograd_keeps(changes):
    """The formula against the storages that the saved tensors of a real forward pass have."""
    config, length = text(**changes), 256
    block = Mamba2Block(config)
    kept = saved_bytes(block, torch.randn(1, length, config.hidden_size, requires_grad=True))
    assert length * block_bytes(config, half=False, kernels=False) == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [{}, {"rope_theta": None, "num_key_value_heads": 4}, {"mlp_activation": "relu2", "attention_head_dim": 64}],
)
@pytest.mark.parametrize("kind", ["attention", "mlp", "both"])
def test_blocks_of_hybrids_keep_and_cost_what_torch_says(kind, changes):
    config, length = text(**HYBRID | changes), 256
    block = Mamba2Block(config, kind)
    x = torch.randn(1, length, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        kept = saved_bytes(block, x)
    assert length * kind_bytes(config, kind, half=False, kernels=False) == pytest.approx(kept, rel=0.02)
    assert length * kind_flops(config, kind, length) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_checkpointing_keeps_the_inputs_of_the_blocks_and_one_block():
    config = text(num_hidden_layers=10)
    kept = activations(config, 1000, 0, 0, half=False, kernels=True)
    block = 1000 * block_bytes(config, half=False, kernels=True)
    assert kept.blocks == 10 * block
    assert kept.checkpointed == 10 * 1000 * 4 * 128 + block


def test_a_blocks_operations_are_those_that_torch_counts():
    config, length = text(width=256, head_dim=64, state_size=64), 128
    block = Mamba2Block(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(torch.randn(1, length, 256))
    assert length * block_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_language_model_costs_two_operations_per_parameter_and_the_scan():
    """2 N per token (arXiv 2001.08361) for all weights but the embedding; the scan by section 6 of arXiv 2405.21060."""
    model = meta_model("2.7b")
    config, forward = model.config.text_config, forward_flops(model)
    matrices = sum(p.numel() for n, p in model.language_model.named_parameters() if "proj" in n)
    e, n, q = 5120, 128, 256
    scan = 64 * (2 * q * (n + e) + 4 * e * n + 2 * 4 * (e + 2 * n))
    assert forward.language_per_token == 2 * matrices + scan
    assert forward.head_per_loss_token == 2 * 2560 * 50_288
    assert config.num_heads == 80


def test_the_encoders_cost_what_their_blocks_do():
    """Of DINOv2-L's 24 blocks 23 run, of SigLIP-SO400M's 27 run 26; a block is 4 d^2 and its MLP, and attention."""
    forward = forward_flops(meta_model("130m"))
    tokens = {"dino": 734, "siglip": 729}  # a class token and four registers
    large = 23 * (24 * 1024**2 * tokens["dino"] + 4 * tokens["dino"] ** 2 * 1024)
    so400m = 26 * ((8 * 1152**2 + 4 * 1152 * 4304) * tokens["siglip"] + 4 * tokens["siglip"] ** 2 * 1152)
    patches = 2 * 729 * 3 * 14 * 14 * (1024 + 1152)
    assert forward.vision_per_image == pytest.approx(large + so400m + patches, rel=0.005)


@pytest.mark.parametrize(
    ("trains", "passes"),
    [
        (["connector"], {"vision": 1, "connector": 2, "language_model": 2}),
        (["connector", "language_model"], {"vision": 1, "connector": 2, "language_model": 3}),
        (["language_model"], {"vision": 1, "connector": 1, "language_model": 3}),
        (["vision", "connector", "language_model"], {"vision": 3, "connector": 3, "language_model": 3}),
    ],
)
def test_a_frozen_part_pays_for_the_gradients_that_pass_through_it(trains, passes):
    forward = forward_flops(meta_model("tiny"))
    model, hardware = training_flops(forward, trains, 100, 10, 2, recompute=True)
    language = 100 * forward.language_per_token
    parts = {
        "vision": 2 * forward.vision_per_image,
        "connector": 2 * forward.connector_per_image,
        "language_model": language + 10 * forward.head_per_loss_token,
    }
    slack = 2 * forward.connector_per_image if "connector" in trains and "vision" not in trains else 0
    exact = sum(parts[part] * number for part, number in passes.items())
    assert exact <= model <= exact + slack  # the connector's inputs need no gradient; its first layer alone gains
    assert hardware == model + language
