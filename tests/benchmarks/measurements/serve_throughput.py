"""Many clients at once against `generate` one at a time: tokens per second of one engine, on the same model in one run.

python -m tests.benchmarks.measurements.serve_throughput [--clients 32] [--requests 4] [--tokens 64] [--rounds 3]
[--threads 2]
        [--preset small|130m] [--device cuda]

Each client asks its questions one after the other over HTTP, half of them with an image, streamed, and waits for every
answer. The service (uvicorn and the whole interface) is in this process, the clients are threads of another. The peer
answers questions of the same kind with the model's own `generate`, one at a time, without HTTP, on the same threads.
Rounds alternate, so that a busy machine hits both. Printed are the medians and the median ratio; the CPU time of this
process for each answer, which a busy machine blurs less; the latency of the clients' requests; and how many answers
differ from `generate`'s in any token (rounding may turn a near tie).

`small` is 4 layers of width 256 with random weights; 130m is the preset at full size, text and vision. Every byte is a
token, so questions are 20 to 180 tokens long.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import torch

from mlmamba.configuration import MLMambaConfig
from mlmamba.conversation import Turn
from mlmamba.images import open_image
from mlmamba.loading import load_model
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import preset
from tests.helpers.images import encoded
from tests.helpers.serve_client import data_uri
from tests.helpers.serving import running, serve
from tests.helpers.tiny import IMAGE_ID, TINY, tiny_tokenizer
from workflows.serve.options import Limits
from workflows.train.initial import save

WORDS = ("what", "is", "shown", "in", "this", "image", "and", "where", "stands", "the", "large", "red", "circle")


def build(name: str, folder: Path, device: str):
    """Model and processor with random weights, saved and loaded as a served model is. Its end token never comes."""
    torch.manual_seed(0)
    if name == "small":
        text = {"hidden_size": 256, "num_hidden_layers": 4, "state_size": 64, "head_dim": 32, "num_heads": 16}
        text |= {"expand": 2, "n_groups": 1, "chunk_size": 64, "vocab_size": 8192, "tie_word_embeddings": True}
        config = MLMambaConfig(
            text_config={**text, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
            vision_config=TINY["vision"],
            connector_config=TINY["connector"],
            image_token_id=IMAGE_ID,
            max_position_embeddings=1000,
        )
    else:
        config = preset(name, image_token_id=IMAGE_ID)
    save(MLMambaForConditionalGeneration(config), tiny_tokenizer(), folder)
    model, processor = load_model(folder, device)
    model.generation_config.eos_token_id = 10**9
    return model, processor


def questions(count: int) -> list[tuple[str, bytes | None]]:
    """Questions of 3 to 30 words, every other with an image."""
    chance = random.Random(0)
    texts = [" ".join(chance.choice(WORDS) for _ in range(chance.randrange(3, 31))) for _ in range(count)]
    return [(text, encoded(i, size=(320, 240)) if i % 2 else None) for i, text in enumerate(texts)]


def generate(model, processor, question: tuple[str, bytes | None], tokens: int) -> str:
    """The text that `generate` makes."""
    text, data = question
    images = [] if data is None else [open_image(data)]
    inputs = processor(images or None, processor.prompt([Turn("user", text, len(images))])).to(model.device)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, use_cache=True)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def stream(url: str, question: tuple[str, bytes | None], tokens: int) -> tuple[str, float, float]:
    """The streamed answer's text, and the seconds to its first word and to its end."""
    text, data = question
    parts = [] if data is None else [{"type": "image_url", "image_url": {"url": data_uri(data)}}]
    body = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}
    body |= {"stream": True, "max_tokens": tokens}
    begun, first, pieces = time.perf_counter(), 0.0, []
    call = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=600) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            piece = event["choices"][0]["delta"].get("content") if event.get("choices") else None
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if piece:
                first = first or time.perf_counter() - begun
                pieces.append(piece)
    return "".join(pieces), first, time.perf_counter() - begun


def crowd(url: str, clients: int, asked: list, tokens: int) -> tuple[float, list[tuple[str, float, float]]]:
    """All questions asked by `clients` at once: the seconds they took, and the answers in order."""
    gate = threading.Barrier(clients + 1)

    def client(mine: list) -> list:
        gate.wait()
        return [stream(url, question, tokens) for question in mine]

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, asked[i::clients]) for i in range(clients)]
        gate.wait()
        begun = time.perf_counter()
        found = [future.result() for future in futures]
        seconds = time.perf_counter() - begun
    return seconds, [found[i % clients][i // clients] for i in range(len(asked))]


def percentile(values: list[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=4, help="of each client, in each round")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--alone", type=int, default=8, help="questions that generate answers in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    asked = questions(a.clients * a.requests)
    limits = Limits(max_batch=a.clients, max_waiting=2 * a.clients)
    alone_rates, crowd_rates, firsts, totals, different, compared = [], [], [], [], 0, 0
    work: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        model, processor = build(a.preset, Path(folder) / "model", a.device)
        service = serve((model, processor), limits, threads=a.threads)
        elsewhere = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with running(service) as url, elsewhere:
            generate(model, processor, asked[1], 4)
            elsewhere.submit(crowd, url, 2, asked[:2], 4).result()
            for number in range(a.rounds):
                begun, used = time.perf_counter(), time.process_time()
                expected = [generate(model, processor, question, a.tokens) for question in asked[: a.alone]]
                alone_rates.append(a.alone * a.tokens / (time.perf_counter() - begun))
                alone_work, used = (time.process_time() - used) / a.alone, time.process_time()
                seconds, answers = elsewhere.submit(crowd, url, a.clients, asked, a.tokens).result()
                work.append(alone_work / ((time.process_time() - used) / len(asked)))
                crowd_rates.append(len(asked) * a.tokens / seconds)
                firsts += [first for _, first, _ in answers]
                totals += [total for _, _, total in answers]
                different += sum(text != answers[i][0] for i, text in enumerate(expected))
                compared += len(expected)
                ratio = crowd_rates[-1] / alone_rates[-1]
                print(
                    f"round {number + 1}: {alone_rates[-1]:,.0f} and {crowd_rates[-1]:,.0f} tokens/s, {ratio:.1f} times"
                )
        service.served.engine.close()
    ratios = [together / alone for together, alone in zip(crowd_rates, alone_rates, strict=True)]
    print(f"\n{a.preset}, {a.threads} threads, {a.device}")
    print(f"{a.clients} clients x {a.requests} requests x {a.tokens} tokens, {a.rounds} rounds")
    print(f"generate, one at a time    {statistics.median(alone_rates):10,.0f} tokens/s")
    print(f"service, {a.clients:3} clients       {statistics.median(crowd_rates):10,.0f} tokens/s")
    print(f"ratio                      {statistics.median(ratios):10.1f}   (wanted: 4)")
    print(f"CPU time of an answer      {statistics.median(work):10.1f} times less than generate's")
    print(f"first word                 {percentile(firsts, 0.5):10.3f} s p50 {percentile(firsts, 0.99):8.3f} s p99")
    print(f"whole answer               {percentile(totals, 0.5):10.3f} s p50 {percentile(totals, 0.99):8.3f} s p99")
    print(f"answers unlike generate's  {different:10} of {compared}")
    return int(statistics.median(ratios) < 4)


if __name__ == "__main__":
    sys.exit(main())
