"""Decoding and prompts on a CPU in each precision, beside the model as it was loaded, and beside llama.cpp.

    python -m tests.benchmarks.measurements.decoding [--threads 1] [--preset 130m] [--llama PYTHON] [--forms fp32 int8]
        [--rows 1 8 32]

Random weights of a preset's language model. Each round times all, one after the other, llama.cpp in a process of its
own on the same weights (`mlmamba convert`; PYTHON is an interpreter with xllamacpp). Printed are tokens per CPU second,
the median of the rounds; the share of the rate at which this machine reads memory in the same run, where a token needs
all weights once and its state in and out; and, as medians of the rounds' ratios with the lowest and highest, how many
times the unprepared model's and llama.cpp's rate at the same precision that is, in CPU seconds and in seconds. How
exact a form is: the relative error of the logits of a prompt, and at how many of its positions the most likely token is
the same.
"""

import argparse
import copy
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from mlmamba.convert.gguf_file import write_gguf
from mlmamba.convert.language import HEAD, LanguageModel
from mlmamba.decoding import pack, prepare
from mlmamba.mamba2 import Mamba2LanguageModel
from mlmamba.presets import preset
from tests.helpers.tiny import tiny_tokenizer

FORMS = ("as loaded", "fp32", "bf16", "int8")
PEERS = {"fp32": "fp32", "bf16": "bf16", "int8": "q8_0"}
BATCHES, PROMPT, ROUNDS = (1, 8, 32), 512, 5
FEW, MORE = 2, 14  # new tokens of llama.cpp's requests: the difference leaves out what else a request takes
Times = list[tuple[float, float]]  # CPU seconds and seconds of a token (of all rows), by round


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


def timed(call: Callable[[], object], repeat: int) -> tuple[float, float]:
    """CPU seconds and seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.process_time() - cpu) / repeat, (time.perf_counter() - wall) / repeat


class Peer:
    """llama.cpp with the same weights, in a process of its own."""

    def __init__(self, python: str, file: Path, threads: int, slots: int):
        script = str(Path(__file__).with_name("decoding_llama.py"))
        command = [python, script, str(file), str(threads), str(slots)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, **pipes)
        self._answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()

    def _answer(self):
        line = next((line for line in self._process.stdout if line.startswith(("[", '"'))), None)
        if line is None:
            raise RuntimeError("llama.cpp has ended; run decoding_llama.py by hand to see why")
        return json.loads(line)

    def _ask(self, *asked: int) -> list[float]:
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def token(self, rows: int) -> tuple[float, float]:
        """CPU seconds and seconds of a step."""
        few, more = self._ask(rows, 8, FEW), self._ask(rows, 8, MORE)
        return tuple((late - early) / (MORE - FEW) for early, late in zip(few, more, strict=True))

    def prompt(self) -> tuple[float, float]:
        """CPU seconds and seconds of a prompt."""
        return tuple(self._ask(1, PROMPT, 1))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--preset", default="130m")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--rows", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--llama", metavar="PYTHON", help="an interpreter with xllamacpp")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = preset(options.preset).text_config
    base = Mamba2LanguageModel(config).eval()
    models = {form: made(base, form) for form in options.forms}
    ids = torch.randint(5, config.vocab_size, (1, PROMPT))
    with ExitStack() as stack:
        peers = {}
        if options.llama:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            files = {PEERS[form]: converted(base, config, folder, PEERS[form]) for form in models if form in PEERS}
            for form, file in files.items():
                peers[form] = stack.enter_context(Peer(options.llama, file, options.threads, max(options.rows)))
        measure(models, peers, options, ids)
    exactness({form: own for form, (own, _) in models.items()}, base, ids)


def measure(models: dict, peers: dict[str, Peer], options: argparse.Namespace, ids: Tensor) -> None:
    memory = torch.ones(2**26)
    reading = memory.nbytes / min(timed(memory.sum, 1)[0] for _ in range(options.rounds + 1))
    print(f"{options.threads} threads, {options.rounds} rounds; reading {reading / 1e9:.1f} GB per CPU second")
    for rows in options.rows:
        steps = {form: step(own, rows) for form, (own, _) in models.items()}
        calls = {form: lambda call=call, n=1 + 8 // rows: timed(call, n) for form, (call, _) in steps.items()}
        calls |= {f"llama.cpp {form}": lambda peer=peer, rows=rows: peer.token(rows) for form, peer in peers.items()}
        limits = {form: rows * reading / (models[form][1] + 2 * steps[form][1]) for form in models}
        show(f"decoding, {rows} rows", in_turns(calls, options.rounds), rows, limits)
    calls = {
        form: lambda own=own: timed(lambda: own.lm_head(own.backbone(own.backbone.embeddings(ids))[0][:, -1:]), 1)
        for form, (own, _) in models.items()
    }
    calls |= {f"llama.cpp {form}": peer.prompt for form, peer in peers.items()}
    show(f"prompt of {PROMPT}", in_turns(calls, max(2, options.rounds // 2)), PROMPT, {})


def in_turns(calls: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, Times]:
    taken: dict[str, Times] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            taken[name].append(call())
    return {name: own[1:] for name, own in taken.items()}


def show(what: str, taken: dict[str, Times], tokens: int, limits: dict[str, float]) -> None:
    """A line for each, with its ratios to the first and to llama.cpp."""
    print(f"\n{what}, tokens per CPU second")
    first = next(iter(taken))
    for name, own in taken.items():
        rate = tokens / statistics.median(cpu for cpu, _ in own)
        cells = [f"{rate:7.1f}"]
        if name in limits:
            cells.append(f"{rate / limits[name]:4.0%} of reading")
        for other in (first, f"llama.cpp {PEERS.get(name)}"):
            if other in taken and other != name and not name.startswith("llama.cpp"):
                cells.append(f"{ratio(own, taken[other], 0)} of {other}, in seconds {ratio(own, taken[other], 1)}")
        print(f"  {name:<15} {'; '.join(cells)}", flush=True)


def ratio(own: Times, other: Times, which: int) -> str:
    """How many times as fast, the median of the rounds with the lowest and the highest."""
    found = sorted(theirs[which] / ours[which] for ours, theirs in zip(own, other, strict=True))
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def exactness(models: dict[str, Mamba2LanguageModel], base: Mamba2LanguageModel, ids: Tensor) -> None:
    exact = base.lm_head(base.backbone(base.backbone.embeddings(ids))[0])
    for form, own in models.items():
        if form != "as loaded":
            found = own.lm_head(own.backbone(own.backbone.embeddings(ids))[0]).float()
            error = (found - exact).norm() / exact.norm()
            same = (found.argmax(-1) == exact.argmax(-1)).float().mean()
            print(f"{form}: logits differ by {error:.1e} of their size, most likely token the same at {same:.1%}")


def converted(base: Mamba2LanguageModel, config, folder: Path, form: str) -> Path:
    """The weights as a GGUF file, with any tokenizer: none is asked."""
    tiny_tokenizer().save_pretrained(folder)
    tensors = {name: t for name, t in base.state_dict().items() if name != HEAD or not config.tie_word_embeddings}
    write_gguf(LanguageModel(config, tensors, "mlmamba", folder), folder / f"{form}.gguf", form)
    return folder / f"{form}.gguf"


if __name__ == "__main__":
    main()
