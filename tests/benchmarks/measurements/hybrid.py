"""A hybrid against transformers' class with the same weights: prompts and decoding, in CPU seconds of one process.

The shape is Granite-4.0-H-350m's with fewer layers, one of four with attention. Both are asked in turn.

python -m tests.benchmarks.measurements.hybrid [--layers 4] [--length 512] [--tokens 32] [--packed]
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlmamba.convert import read_language_model
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.presets import GRANITE


def pair(layers: int):
    _, _, width, heads, dim, queries, keys, mlp = GRANITE["granite-4.0-h-350m"]
    config = AutoConfig.for_model(
        "granitemoehybrid",
        vocab_size=8192,
        hidden_size=width,
        num_hidden_layers=layers,
        layer_types=["full_attention" if i % 4 == 2 else "linear_attention" for i in range(layers)],
        mamba_n_heads=heads,
        mamba_d_head=dim,
        mamba_d_state=128,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        shared_intermediate_size=mlp,
        num_local_experts=0,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = read_language_model(folder)
    ours = Mamba2LanguageModel(model.config).eval()
    ours.load_state_dict(model.tensors, strict=False)
    return theirs, ours


def in_turn(runs: dict, times: int) -> dict[str, float]:
    """Median CPU seconds of each, all run once before."""
    for run in runs.values():
        run()
    found = {name: [] for name in runs}
    for _ in range(times):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            found[name].append(time.process_time() - begun)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8, help="of a packed row")
    a = parser.parse_args()
    theirs, ours = pair(a.layers)
    backbone, ids = ours.backbone, torch.randint(2, 8192, (1, a.length))

    def our_prompt(marks=None):
        hidden, state = backbone(backbone.embeddings(ids), seq_idx=marks)
        return ours.lm_head(hidden[:, -1:]), state

    def their_prompt():
        out = theirs(ids, use_cache=True, logits_to_keep=1)
        return out.logits, out.past_key_values

    def our_decoding():
        _, state = our_prompt()
        return decode(lambda token, s: step(token, s), state)

    def step(token, state):
        hidden, state = backbone(backbone.embeddings(token), state.in_place())
        return ours.lm_head(hidden), state

    def their_step(token, cache):
        out = theirs(token, past_key_values=cache, use_cache=True)
        return out.logits, out.past_key_values

    def decode(one, state):
        token = torch.tensor([[5]])
        for _ in range(a.tokens):
            logits, state = one(token, state)
            token = logits[:, -1:].argmax(-1)

    print("largest difference of logits", (our_prompt()[0] - their_prompt()[0]).abs().max().item())
    marks = torch.arange(a.length)[None] * a.sequences // a.length
    prompt = in_turn({"ours": our_prompt, "theirs": their_prompt, "packed": lambda: our_prompt(marks)}, a.times)
    whole = in_turn({"ours": our_decoding, "theirs": lambda: decode(their_step, their_prompt()[1])}, a.times)
    print(f"prompt of {a.length}: {prompt['theirs'] / prompt['ours']:.1f} times as fast as transformers")
    print(f"the same, packed of {a.sequences} sequences, takes {prompt['packed'] / prompt['ours']:.2f} times as long")
    ours_each, theirs_each = ((whole[name] - prompt[name]) / a.tokens for name in ("ours", "theirs"))
    print(f"a token after it: {theirs_each / ours_each:.1f} times as fast ({ours_each * 1e3:.1f} ms of CPU)")


if __name__ == "__main__":
    main()
