"""Decoding and prompts on a CPU in each precision, beside the model as it was loaded; with llama.cpp as a peer.

    python -m tests.benchmarks.measurements.decoding [--threads 1] [--preset 130m] [--llama PYTHON]

Random weights of a preset's language model. Each round times all, one after the other; printed are tokens per CPU
second by the fastest round, how many times the unprepared model's that is, and the share of the rate at which this
machine reads memory in the same run, where a token needs all weights once and its state in and out. How exact a form
is: the relative error of the logits of a prompt, and at how many of its positions the most likely token is the same.

PYTHON is an interpreter, of an environment of its own, that has xllamacpp, gguf and numpy; the same weights go to it.
"""

import argparse
import copy
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from mlmamba.decoding import pack, prepare
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.presets import preset

FORMS = ("as loaded", "fp32", "bf16", "int8")
BATCHES, PROMPT, ROUNDS = (1, 8, 32), 512, 7
SHAPE = ("hidden_size", "num_hidden_layers", "conv_kernel", "num_heads", "head_dim", "state_size", "n_groups")
SHAPE += ("layer_norm_epsilon", "vocab_size")


def made(base: Mamba2LanguageModel, form: str) -> tuple[Mamba2LanguageModel, int]:
    """The model in a form, and the bytes that a token reads of it."""
    language = copy.deepcopy(base)
    language = language.bfloat16() if form == "bf16" else language
    size = sum(p.nbytes for p in {id(p): p for p in language.parameters()}.values())
    if form == "int8":
        pack(language, "int8")
        size = size // 4
    if form != "as loaded":
        print(prepare(SimpleNamespace(language_model=language, device=torch.device("cpu"))))
    return language, size


def step(language: Mamba2LanguageModel, batch: int) -> tuple[Callable[[], Tensor], int]:
    """One token of each row, and the bytes of their state."""
    backbone = language.backbone
    ids = torch.randint(5, backbone.embeddings.num_embeddings, (batch, 8))
    held = [backbone(backbone.embeddings(ids))[1].in_place()]

    def run() -> Tensor:
        hidden, state = backbone(backbone.embeddings(ids[:, -1:]), held[0])
        held[0] = state.in_place()
        return language.lm_head(hidden)

    return run, held[0].nbytes


def fastest(calls: dict[str, Callable[[], object]], rounds: int, repeat: int) -> dict[str, float]:
    """CPU seconds of each call at its best, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(repeat):
                call()
            taken[name].append((time.process_time() - start) / repeat)
    return {name: min(own[1:]) for name, own in taken.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--preset", default="130m")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--llama", metavar="PYTHON", help="an interpreter with xllamacpp, gguf and numpy")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = preset(options.preset).text_config
    base = Mamba2LanguageModel(config).eval()
    models = {form: made(base, form) for form in FORMS}
    memory = torch.ones(2**26)
    reading = memory.nbytes / fastest({"": memory.sum}, options.rounds, 1)[""]
    print(f"{options.threads} threads; reading {reading / 1e9:.1f} GB per CPU second")
    rows = {}
    for batch in BATCHES:
        steps = {form: step(own, batch) for form, (own, _) in models.items()}
        seconds = fastest({form: call for form, (call, _) in steps.items()}, options.rounds, 2)
        limits = {form: batch * reading / (models[form][1] + 2 * steps[form][1]) for form in FORMS}
        rows[f"decoding, {batch} rows"] = {form: (batch / seconds[form], limits[form]) for form in FORMS}
    ids = torch.randint(5, config.vocab_size, (1, PROMPT))
    read = {}
    for form, (own, _) in models.items():
        read[form] = lambda own=own: own.lm_head(own.backbone(own.backbone.embeddings(ids))[0][:, -1:])
    seconds = fastest(read, max(2, options.rounds // 3), 1)
    rows[f"prompt of {PROMPT}"] = {form: (PROMPT / seconds[form], None) for form in FORMS}
    show(rows, "as loaded")
    exact, *others = (own.lm_head(own.backbone(own.backbone.embeddings(ids))[0]).float() for own, _ in models.values())
    for form, found in zip(FORMS[1:], others, strict=True):
        error = (found - exact).norm() / exact.norm()
        same = (found.argmax(-1) == exact.argmax(-1)).float().mean()
        print(f"{form}: logits differ by {error:.1e} of their size, most likely token the same at {same:.1%}")
    if options.llama:
        peers(options.llama, base, config, options.threads)


def show(rows: dict[str, dict[str, tuple[float, float | None]]], first: str) -> None:
    """Tokens per CPU second, how many times the first column's, and the share of the memory's rate."""
    for name, found in rows.items():
        cells = []
        for form, (rate, limit) in found.items():
            share = "" if limit is None else f", {rate / limit:.0%} of reading"
            cells.append(f"{form} {rate:.1f} ({rate / found[first][0]:.2f}x{share})")
        print(f"{name:<20}" + "; ".join(cells), flush=True)


def peers(python: str, base: Mamba2LanguageModel, config, threads: int) -> None:
    """llama.cpp's rates with the same weights, in float32, bfloat16 and 8 bits."""
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: t.numpy() for name, t in base.state_dict().items() if name != "lm_head.weight"}
        np.savez(Path(folder, "weights.npz"), **weights)
        Path(folder, "shape.json").write_text(json.dumps({name: getattr(config, name) for name in SHAPE}))
        for form in ("f32", "bf16", "q8_0"):
            script = str(Path(__file__).with_name("decoding_llama.py"))
            command = [python, script, folder, form, str(threads), *map(str, BATCHES)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode:
                print(f"llama.cpp {form}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1][:200]}")
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"llama.cpp {form:<10}" + "; ".join(f"{name} {rate:.1f}" for name, rate in found.items()), flush=True)


if __name__ == "__main__":
    main()
