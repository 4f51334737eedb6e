"""Memory of one GPU in training, by ZeRO stage: model states exactly, activations by what the operators keep.

Model states, in bytes, with W parameters of which T train, on N workers. The ZeRO paper (Rajbhandari et al. 2020,
arXiv 1910.02054, section 3.1) counts 2 W for half-precision weights, 2 T for their gradients and 12 T for Adam in
float32. Here the weights themselves are float32 (bf16 is autocast over them, so that A_log, dt_bias and D keep their
precision):

              weights   gradients   Adam: two moments, and a copy of the weights
    ZeRO 0    4 W       4 T         8 T
    ZeRO 1    4 W       4 T         8 T/N + 4 T/N
    ZeRO 2    4 W       4 T/N       8 T/N + 4 T/N
    ZeRO 3    4 W/N     4 T/N       8 T/N

The stages shard as in the paper (figure 1: P_os, P_os+g, P_os+g+p). DeepSpeed 0.19 keeps a float32 copy of its share
of float32 weights under ZeRO 1 and 2 (runtime/zero/stage_1_and_2.py, single_partition_of_fp32_groups) and none under
ZeRO 3 (stage3.py shares it). Its buffers come on top: a reduce bucket for every type that travels, of 5e8 elements
under ZeRO 1 to 3 or of GPU_BUCKET on a GPU, where under ZeRO 1 and 2 there are two, one being filled while the other is
reduced; and under ZeRO 3 the gathered parameters, at most stage3_max_live_parameters = 1e9 (defaults of
runtime/zero/config.py). In bf16 the buffers also hold autocast's copies of the weights that train, 2 bytes each, but
under ZeRO 3, which gathers in bf16.

Activations, in bytes per token, of a Mamba-2 block of width d, inner width e, h heads, g groups, state n, chunk q, for
a compute type of a bytes. The list is that of the tensors which autograd keeps (tests/unit/plan/test_memory.py compares
it with what it keeps):

    residual, in and out of the block's norm, float32        8 d
    normalised input of in_proj                              a d
    in_proj's output (z, xBC, dt)                            a (2 e + 2 g n + h)
    convolution before its activation                        a (e + 2 g n)
    scan on the torch path: x, B, C and from the states      4 (2 e + 2 g n)
    dt and its running sum, states that enter the chunks     8 h + 4 e n / q
    gated norm in float32, and out_proj's input              16 e + a e

An MLP of inner width m keeps 4 a m besides residual and input; attention of h heads and g groups of p channels keeps
a p (2 h + 2 g), with rotary positions a p (2 h + g + 1) more, and 4 h. Its mask of a packed row, a byte for each pair
of positions, is left out.

mamba_ssm's kernels keep x, B, C and their output in the compute type instead of what the scan and the gated norm have
here, and no states. With checkpointing each block keeps its residual alone, 4 d, and one block at a time has the rest.
The cross entropy keeps logits and probabilities of the positions with loss: 8 + a bytes per entry of the vocabulary.
"""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from workflows.train.stage import GPU_BUCKET

REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class ModelStates:
    """Bytes of one GPU under one ZeRO stage."""

    zero_stage: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    on_cpu: int = 0
    """Bytes of the worker's main memory, with offload."""

    @property
    def total(self) -> int:
        """On the GPU."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    def as_dict(self) -> dict:
        return {**asdict(self), "total": self.total}


def model_states(
    parameters: int,
    trained: int,
    workers: int,
    zero_stage: int,
    offload: str = "none",
    halved: int = 0,
    gpu: bool = False,
) -> ModelStates:
    """Weights, gradients and optimizer of one worker.

    Args:
        parameters: all of the model.
        trained: those that train.
        offload: "none"; "optimizer" or "parameters" to main memory, as TrainRecipe has it.
        halved: those that train and travel as bf16.
        gpu: the workers have GPUs: communication overlaps, and whole buckets are taken.
    """
    share = workers if zero_stage else 1
    weights = 4 * parameters // (workers if zero_stage == 3 else 1)
    gradients = 4 * trained // (workers if zero_stage >= 2 else 1)
    copy = 4 * trained // share if zero_stage in (1, 2) else 0
    optimizer = 8 * trained // share + copy
    buffers = 0
    if zero_stage:
        types = 2 * bool(halved) + 4 * (trained > halved)
        twice = 2 if gpu and zero_stage < 3 else 1
        buffers = types * (twice * GPU_BUCKET if gpu else min(REDUCE_BUCKET, trained))
    if zero_stage == 3:
        buffers += (2 if halved else 4) * min(MAX_LIVE, parameters) if workers > 1 else 0
    else:
        buffers += 2 * halved
    on_cpu = 0
    if offload != "none" and zero_stage:
        on_cpu, optimizer = optimizer + gradients, 0
        if zero_stage >= 2:
            gradients = 0
        if offload == "parameters" and zero_stage == 3:
            on_cpu, weights = on_cpu + weights, 0
    return ModelStates(zero_stage, weights, gradients, optimizer, buffers, on_cpu)


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro batch keeps for the backward pass."""

    blocks: int
    """All language blocks without checkpointing."""
    checkpointed: int
    """All language blocks with it: their inputs, and one block whole."""
    loss: int
    connector: int

    def total(self, checkpointing: bool) -> int:
        return (self.checkpointed if checkpointing else self.blocks) + self.loss + self.connector


def activations(text, tokens: int, loss_tokens: int, connector: int, half: bool, kernels: bool) -> Activations:
    """Activations of one micro batch.

    Args:
        text: the language model's config.
        tokens: positions of the micro batch, padding included.
        loss_tokens: those with a label.
        connector: bytes that the connector keeps for the micro batch's images.
        half: compute in bf16.
        kernels: the scan is that of mamba_ssm, which keeps no float32 copies.
    """
    residual = 4 * text.hidden_size * tokens
    # On the torch path the backward pass of one block makes decays of (heads, chunk, chunk), four at a time.
    transient = 0 if kernels else 4 * 4 * text.num_heads * text.chunk_size * tokens
    blocks = [kind_bytes(text, kind, half, kernels) * tokens for kind in text.kinds]
    return Activations(
        blocks=sum(blocks) + transient,
        checkpointed=len(blocks) * residual + max(blocks) + transient,
        loss=loss_tokens * text.vocab_size * (8 + (2 if half else 4)),
        connector=connector,
    )


def kind_bytes(text, kind: str, half: bool, kernels: bool) -> float:
    """Bytes per token that autograd keeps of one block of a kind."""
    a, d = 2 if half else 4, text.hidden_size
    around = 8 * d + a * d  # the residual, and the input of in_proj
    if kind == "mamba2":
        return block_bytes(text, half, kernels)
    if kind == "mlp":  # halves and product; or only relu's output and its square
        return around + a * text.mlp_size * (4 if text.mlp_activation == "swiglu" else 2)
    queries, keys = (text.attention_head_dim * n for n in (text.num_attention_heads, text.num_key_value_heads))
    turned = 0
    if text.rope_theta is not None:  # turned queries and keys, the output in another order, cosines and sines
        turned = 2 * queries + keys + int(text.attention_head_dim * text.partial_rotary_factor)
    attention = a * (2 * queries + 2 * keys + turned) + 4 * text.num_attention_heads
    return attention + (around if kind == "attention" else block_bytes(text, half, kernels))


def block_bytes(text, half: bool, kernels: bool) -> float:
    """Bytes per token that autograd keeps of one Mamba-2 block."""
    a = 2 if half else 4
    d, h, n, g, q = text.hidden_size, text.num_heads, text.state_size, text.n_groups, text.chunk_size
    e = h * text.head_dim
    conv = e + 2 * g * n
    kept = 8 * d + a * d + a * (e + conv + h) + a * conv + a * e + 8 * h
    if kernels:
        return kept + a * (conv + 2 * e)
    return kept + 4 * (e + conv) + 4 * e * n / q + 16 * e


def saved_bytes(module: nn.Module, *inputs) -> int:
    """Bytes of the tensors that autograd keeps of one forward pass, each storage once, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, tuple[int, object]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no later one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*inputs)
    return sum(size for size, _ in kept.values())
