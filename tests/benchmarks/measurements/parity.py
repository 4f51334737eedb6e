"""Table of how far the paths agree: worst relative error over the tests' grids.

    python -m tests.benchmarks.measurements.parity

The error is the largest difference over the largest value of the truth, as in tests/helpers/closeness.py. With a GPU
and the kernels installed, the rows of the CUDA path are there too.
"""

import itertools
from collections.abc import Iterable

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from mlmamba import ops
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.ops import naive
from tests.helpers.closeness import gradients, relative_error
from tests.helpers.ops_inputs import conv_inputs, ssd_inputs

CHUNK = 64
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def recurrence(path: str, device: str, dtype: torch.dtype) -> tuple[float, float, float]:
    """Worst errors of the outputs, the final state and any gradient against the recurrence."""
    worst = [0.0, 0.0, 0.0]
    for length, groups, state, packed in itertools.product(LENGTHS, (1, 2), (False, True), (False, True)):
        inputs = ssd_inputs(length, groups, state, packed, dtype, device, head_dim=32, state=32)
        with ops.force_path(path):
            ours = ops.ssd(**inputs, chunk_size=CHUNK)
        _update(worst, ours, naive.ssd(**inputs), inputs)
    return tuple(worst)


def convolution(path: str, device: str, dtype: torch.dtype) -> tuple[float, float, float]:
    worst = [0.0, 0.0, 0.0]
    for length, state, packed in itertools.product(LENGTHS, (False, True), (False, True)):
        inputs = conv_inputs(length, state, packed, dtype, device, channels=64)
        with ops.force_path(path):
            ours = ops.causal_conv1d(**inputs)
        _update(worst, ours, naive.causal_conv1d(**inputs), inputs)
    return tuple(worst)


def _update(worst: list[float], ours: tuple, truth: tuple, inputs: dict) -> None:
    for i in range(2):
        worst[i] = max(worst[i], relative_error(ours[i], truth[i]))
    leaves = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    expected = gradients(truth, leaves)
    for name, gradient in gradients(ours, leaves).items():
        worst[2] = max(worst[2], relative_error(gradient, expected[name], floor=1.0))


@torch.no_grad()
def language_model() -> Iterable[tuple[str, float]]:
    """Our language model against transformers' with the same weights, and against itself read in other ways."""
    errors = {"prefill": 0.0, "decoding, 16 steps": 0.0, "packed rows": 0.0, "prompt in pieces": 0.0}
    for groups, state, chunk in ((1, 128, 256), (2, 64, 32), (4, 16, 7)):
        config = Mamba2Config(
            hidden_size=256,
            num_hidden_layers=4,
            num_heads=8,
            head_dim=64,
            state_size=state,
            n_groups=groups,
            chunk_size=chunk,
            vocab_size=512,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
        torch.manual_seed(0)
        theirs = Mamba2ForCausalLM(config).eval()
        ours = Mamba2LanguageModel(config).eval()
        ours.load_state_dict(theirs.state_dict())
        ids = torch.randint(2, 512, (2, 300))

        def read(ids, state=None, seq_idx=None, ours=ours):
            hidden, state = ours.backbone(ours.backbone.embeddings(ids), state, seq_idx=seq_idx)
            return ours.lm_head(hidden), state

        logits, _ = read(ids)
        _worse(errors, "prefill", logits, theirs(ids).logits)
        prefix, state_after = read(ids[:, :284])
        steps = []
        for t in range(284, 300):
            step, state_after = read(ids[:, t : t + 1], state_after)
            steps.append(step)
        _worse(errors, "decoding, 16 steps", torch.cat(steps, dim=1), theirs(ids).logits[:, 284:])
        last, _ = read(ids[:, 284:], read(ids[:, :284])[1])
        _worse(errors, "prompt in pieces", torch.cat([prefix, last], dim=1), logits)
        seq_idx = torch.arange(300).ge(130).int().expand(2, -1)
        alone = torch.cat([read(ids[:, :130])[0], read(ids[:, 130:])[0]], dim=1)
        _worse(errors, "packed rows", read(ids, seq_idx=seq_idx)[0], alone)
    return errors.items()


def _worse(errors: dict[str, float], name: str, ours: torch.Tensor, truth: torch.Tensor) -> None:
    errors[name] = max(errors[name], relative_error(ours, truth))


def main() -> None:
    places = [("torch", "cpu")]
    if torch.cuda.is_available():
        places.append(("torch", "cuda"))
        if ops.has_kernels():
            places.append(("cuda", "cuda"))
    print(f"{'against the recurrence':40}{'outputs':>10}{'state':>10}{'gradients':>11}")
    for (path, device), (name, measure) in itertools.product(
        places, (("SSD", recurrence), ("convolution", convolution))
    ):
        for dtype in DTYPES[path == "cuda" :]:  # the kernels have no float64
            errors = measure(path, device, dtype)
            label = f"{name}, {path} path on {device}, {str(dtype).removeprefix('torch.')}"
            print(f"{label:40}{errors[0]:10.1e}{errors[1]:10.1e}{errors[2]:11.1e}")
    print(f"\n{'language model, float32':40}{'logits':>10}")
    for name, error in language_model():
        against = "itself" if name in ("packed rows", "prompt in pieces") else "transformers"
        print(f"{f'{name}, against {against}':40}{error:10.1e}")


if __name__ == "__main__":
    main()
