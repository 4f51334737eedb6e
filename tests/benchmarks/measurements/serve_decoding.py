"""Decoding over HTTP in each precision, at 1, 8 and 32 clients: rates, first tokens, the time between tokens.

python -m tests.benchmarks.measurements.serve_decoding [--clients 1 8 32] [--forms "as loaded" fp32 bf16 int8]
        [--tokens 32] [--rounds 2] [--threads 1] [--preset 130m] [--busy-prefill-tokens N]

The service (uvicorn and the whole interface) is in this process, its clients are threads of another; each asks a
question of text, streamed, and then the next. "as loaded" is the float32 model without anything made ready, as all was
served before. Weights are random but for what keeps answers to letters, which are shown at once; a byte is a token.
Forms are asked in turns, and printed are, over all rounds: tokens per CPU second of this process and per second; how
many times the first form's rate in CPU seconds; the median and the 99th percentile of milliseconds to the first token
and between two; and what share of the CPU time is the model's own step, timed by itself on as many rows.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from mlmamba.decoding import Decoder, Prepared
from mlmamba.loading import load_model
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import preset
from tests.helpers.serving import running, serve
from tests.helpers.tiny import IMAGE_ID, TINY, tiny_tokenizer
from workflows.serve.auth import Access
from workflows.serve.options import Limits
from workflows.train.initial import save

FORMS = ("as loaded", "fp32", "bf16", "int8")
WORDS = ("what", "is", "shown", "in", "this", "image", "and", "where", "stands", "the", "large", "red", "circle")


@dataclass
class Seen:
    """What the clients of one form saw, and what it cost."""

    tokens: int = 0
    cpu: float = 0.0
    seconds: float = 0.0
    step: float = 0.0
    """CPU seconds of the model's own step."""
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def stream(url: str, text: str, tokens: int) -> tuple[int, float, list[float]]:
    """Tokens of a streamed answer, seconds to the first piece, and between two."""
    body = {"messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": tokens}
    body |= {"stream_options": {"include_usage": True}}
    call = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begun, times, made = time.perf_counter(), [], 0
    with urllib.request.urlopen(call, timeout=600) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event["choices"] and event["choices"][0]["delta"].get("content"):
                    times.append(time.perf_counter())
                made = (event.get("usage") or {}).get("completion_tokens", made)
    if not times:
        return made, time.perf_counter() - begun, []
    return made, times[0] - begun, [late - early for early, late in pairwise(times)]


def crowd(url: str, clients: int, tokens: int, asked: int, seed: int) -> tuple[float, list]:
    """Seconds in which each of the clients has had its answers, and those."""
    gate = threading.Barrier(clients + 1)

    def client(number: int) -> list:
        chance = random.Random(1000 * seed + number)
        gate.wait()
        return [stream(url, " ".join(chance.choice(WORDS) for _ in range(5)), tokens) for _ in range(asked)]

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, number) for number in range(clients)]
        gate.wait()
        begun = time.perf_counter()
        found = [one for future in futures for one in future.result()]
    return time.perf_counter() - begun, found


def built(config) -> MLMambaForConditionalGeneration:
    """Random weights, letters far more likely than other tokens."""
    model = MLMambaForConditionalGeneration(config)
    letters = tiny_tokenizer()("".join(map(chr, range(ord("a"), ord("z") + 1))))["input_ids"]
    others = torch.ones(config.text_config.vocab_size, dtype=torch.bool)
    others[letters] = False
    with torch.no_grad():
        model.language_model.backbone.embeddings.weight[others] *= 0.1
    return model


@torch.inference_mode()
def step_seconds(model, rows: int) -> float:
    """CPU seconds of one step of so many rows."""
    state = model(torch.full((1, 8), 5), use_cache=True).cache_params
    decoder = Decoder(model, rows)
    for _ in range(rows):
        decoder.add(state, 0, 5, None)
    ids, taken = [5] * rows, []
    for _ in range(4):
        begun = time.process_time()
        decoder.logits(ids)
        taken.append(time.process_time() - begun)
    return min(taken)


def measure(forms: dict, clients: int, a: argparse.Namespace, elsewhere: ProcessPoolExecutor) -> dict[str, Seen]:
    seen = {form: Seen() for form in forms}
    for number in range(a.rounds):
        for form, (model, url) in forms.items():
            own, used = seen[form], time.process_time()
            seconds, found = elsewhere.submit(crowd, url, clients, a.tokens, a.asked, number).result()
            own.cpu += time.process_time() - used
            own.seconds += seconds
            own.tokens += sum(made for made, _, _ in found)
            own.firsts += [first for _, first, _ in found]
            own.gaps += [gap for _, _, gaps in found for gap in gaps]
            own.step += step_seconds(model, clients) * sum(made for made, _, _ in found) / clients
    return seen


def show(clients: int, seen: dict[str, Seen]) -> None:
    print(f"\n{clients} clients")
    first = next(iter(seen.values()))
    for form, own in seen.items():
        ratio = own.tokens / own.cpu / (first.tokens / first.cpu)
        cells = [f"{own.tokens / own.cpu:7.1f} tokens per CPU second ({ratio:.2f}x)"]
        cells.append(f"{own.tokens / own.seconds:6.1f} per second")
        for what, values in (("first", own.firsts), ("between", own.gaps)):
            ordered = sorted(values) or [0.0]
            p50, p99 = (1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99))
            cells.append(f"{what} {p50:,.0f} and {p99:,.0f} ms")
        print(f"  {form:<10} {'; '.join(cells)}; step {own.step / own.cpu:.0%} of the CPU time", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", nargs="+", type=int, default=(1, 8, 32))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--asked", type=int, default=2, help="questions of each client in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--preset", default="130m")
    parser.add_argument("--busy-prefill-tokens", type=int, help="as of the service's limits")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        config = preset(a.preset, image_token_id=IMAGE_ID, vision=TINY["vision"], connector=TINY["connector"])
        save(built(config), tiny_tokenizer(), folder)
        elsewhere = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        forms = {}
        for form in a.forms:
            model, processor = load_model(folder, "cpu", "fp32" if form == "as loaded" else form)
            model.generation_config.eos_token_id = 10**9
            if form == "as loaded":
                model.prepared = Prepared("fp32", "torch: as loaded", "not packed")
            limits = Limits(
                max_batch=max(a.clients),
                max_waiting=2 * max(a.clients),
                busy_prefill_tokens=a.busy_prefill_tokens,
            )
            service = serve((model, processor), limits, Access(log_requests=False), threads=a.threads)
            url = stack.enter_context(running(service))
            stack.callback(service.served.engine.close)
            forms[form] = model, url
            elsewhere.submit(crowd, url, 1, 4, 1, 0).result()
        for clients in a.clients:
            show(clients, measure(forms, clients, a, elsewhere))


if __name__ == "__main__":
    main()
