"""A hybrid against transformers' class with the same weights: prompts and decoding, in CPU seconds of one process.

The shape is Granite-4.0-H-350m's with fewer layers, one of four with attention. Asked in turn are transformers' class,
ours as it was loaded, and ours as a service prepares it, in float32 and with the weights of linear layers in int8.

python -m tests.benchmarks.measurements.hybrid [--layers 4] [--length 512] [--tokens 32]
"""

import argparse
import copy
import statistics
import tempfile
import time
from functools import partial
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlmamba.convert import read_language_model
from mlmamba.decoding import pack, prepare
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


class Ours:
    """A language model's prompt and decoding."""

    def __init__(self, language: Mamba2LanguageModel):
        self._language, self._backbone = language, language.backbone

    def prompt(self, ids, marks=None):
        hidden, state = self._backbone(self._backbone.embeddings(ids), seq_idx=marks)
        return self._language.lm_head(hidden[:, -1:]), state

    def step(self, token, state):
        hidden, state = self._backbone(self._backbone.embeddings(token), state.in_place())
        return self._language.lm_head(hidden), state


class Theirs:
    """The same of transformers' class."""

    def __init__(self, model):
        self._model = model

    def prompt(self, ids):
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        return out.logits, out.past_key_values

    def step(self, token, cache):
        out = self._model(token, past_key_values=cache, use_cache=True)
        return out.logits, out.past_key_values


def decode(model, ids, tokens: int) -> None:
    _, state = model.prompt(ids)
    token = torch.tensor([[5]])
    for _ in range(tokens):
        logits, state = model.step(token, state)
        token = logits[:, -1:].argmax(-1)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="three at least: the third has attention")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8, help="of a packed row")
    a = parser.parse_args()
    torch.set_num_threads(1)
    theirs, loaded = pair(a.layers)
    ids = torch.randint(2, 8192, (1, a.length))
    models = {"transformers": Theirs(theirs), "as loaded": Ours(loaded)}
    for form in ("fp32", "int8"):
        ready = copy.deepcopy(loaded)
        if form == "int8":
            pack(ready, form)
        print(prepare(SimpleNamespace(language_model=ready, device=torch.device("cpu"))))
        models[form] = Ours(ready)
    logits = {name: model.prompt(ids)[0] for name, model in models.items()}
    prompts = {name: partial(model.prompt, ids) for name, model in models.items()}
    marks = torch.arange(a.length)[None] * a.sequences // a.length
    prompt = in_turn(prompts | {"packed": partial(models["as loaded"].prompt, ids, marks)}, a.times)
    whole = in_turn({name: partial(decode, model, ids, a.tokens) for name, model in models.items()}, a.times)
    each = {name: (whole[name] - prompt[name]) / a.tokens for name in models}
    for name in models:
        faster = [prompt["transformers"] / prompt[name], each["transformers"] / each[name]]
        apart = (logits[name] - logits["transformers"]).abs().max().item()
        print(
            f"{name:13} prompt of {a.length} {prompt[name] * 1e3:7.1f} ms of CPU ({faster[0]:.2f} times as fast), "
            f"a token after it {each[name] * 1e3:6.2f} ms ({faster[1]:.2f}), logits within {apart:.1e}"
        )
    longer = prompt["packed"] / prompt["as loaded"]
    print(f"packed of {a.sequences} sequences, a prompt takes {longer:.2f} times as long")


if __name__ == "__main__":
    main()
