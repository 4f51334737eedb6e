"""What a kept state saves over HTTP: questions about one image, conversations, several answers to one image.

python -m tests.benchmarks.measurements.serve_kept_states [--side 224] [--questions 100] [--chats 20] [--rounds 3]
        [--threads 1] [--preset 130m] [--llama PYTHON]

The service (uvicorn and the whole interface) is in this process, its one client in another. Models have random weights:
the preset's language model with GPT-NeoX's tokenizer behind a ViT-B/16, whose images take 196 placeholders at a side of
224 and 729 at 432. "without" is the same service with state_cache_bytes 0, asked in turns with the other. Printed are
medians, in brackets the range of the middle half and how many: milliseconds to the first token, and of CPU time of the
service for the whole request, with its eight tokens.

With --llama the same is asked of llama.cpp's server with its prompt cache, on the same language model in float32: it
reads as many tokens of text in place of an image, without an encoder. PYTHON has the package xllamacpp.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedTokenizerFast

from mlmamba.conversation import IMAGE_TOKEN
from mlmamba.convert import convert
from mlmamba.loading import load_model
from mlmamba.modeling import MLMambaForConditionalGeneration
from mlmamba.presets import preset
from tests.helpers.images import encoded
from tests.helpers.llama import llama_server
from tests.helpers.serve_client import data_uri
from tests.helpers.serving import running, serve
from tests.helpers.tiny import NEOX, NO_NEOX
from workflows.serve.auth import Access
from workflows.serve.options import Limits
from workflows.train.initial import save

WORDS = ("what", "is", "shown", "in", "this", "image", "and", "where", "stands", "the", "large", "red", "circle")
TOKENS = 8  # of an answer
END = "<|endoftext|>"


@dataclass(frozen=True)
class Took:
    """One request: seconds to the first token, seconds and CPU seconds in all, and the prompt's tokens: all, cached."""

    first: float
    whole: float
    cpu: float
    prompt: int
    cached: int
    text: str


def build(name: str, side: int, folder: Path):
    """Model and processor with random weights, saved and loaded as a served model is. It answers with one word over and
    over, which comes back as the tokens that it was, and never ends."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(NEOX), eos_token=END, pad_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    vision = {"towers": [{"model": "vit_base_patch16_224", "block": -2}], "image_size": side}
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = preset(name, image_token_id=image_id, max_position_embeddings=10_000, vision=vision)
    save(MLMambaForConditionalGeneration(config), tokenizer, folder)
    model, processor = load_model(folder)
    words = (tokenizer(f"\n{word * TOKENS}", add_special_tokens=False)["input_ids"] for word in WORDS)
    word = next(ids[1] for ids in words if ids[1:] == ids[1:2] * TOKENS)
    model.generation_config.suppress_tokens = [i for i in range(config.text_config.vocab_size) if i != word]
    model.generation_config.eos_token_id = 10**9
    return model, processor


def user(text: str, image: bytes | None = None) -> dict:
    parts = [] if image is None else [{"type": "image_url", "image_url": {"url": data_uri(image)}}]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def post(url: str, messages: list[dict], n: int = 1) -> Took:
    """A streamed request's times; CPU seconds are not known here."""
    body = {"messages": messages, "stream": True, "max_tokens": TOKENS, "n": n, "temperature": 1.0, "seed": 0}
    body |= {"stream_options": {"include_usage": True}}
    call = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begun, first, pieces, usage = time.perf_counter(), 0.0, [], {}
    with urllib.request.urlopen(call, timeout=600) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if piece:
                first = first or time.perf_counter() - begun
                pieces.append(piece)
            usage = event.get("usage") or usage
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Took(first, time.perf_counter() - begun, 0.0, usage["prompt_tokens"], cached, "".join(pieces))


class Service:
    """A running service and how it is asked."""

    def __init__(self, url: str, elsewhere: ProcessPoolExecutor):
        self._url, self._elsewhere = url, elsewhere

    def ask(self, messages: list[dict], n: int = 1) -> Took:
        """One request from the other process, with the CPU seconds of this one."""
        used = time.process_time()
        took = self._elsewhere.submit(post, self._url, messages, n).result()
        return Took(took.first, took.whole, time.process_time() - used, took.prompt, took.cached, took.text)


@contextmanager
def services(loaded, threads: int) -> Iterator[tuple[Service, Service]]:
    """With kept states and without, on the same model."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as elsewhere:
        quiet = Access(log_requests=False)
        limits = [Limits(state_cache_bytes=size, max_batch=8) for size in (2**30, 0)]
        kept, plain = (serve(loaded, own, quiet, threads=threads) for own in limits)
        with running(kept) as one, running(plain) as other:
            pair = Service(one, elsewhere), Service(other, elsewhere)
            for service in pair:
                service.ask([user("warm")])
            yield pair
        kept.served.engine.close()
        plain.served.engine.close()


def question(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words))


def one_image(ask: Callable[[str, int], Took], count: int, number: int) -> list[Took]:
    """Questions about image `number`, of five words, every fifth of one."""
    chance = random.Random(number)
    return [ask(question(chance, 1 if i % 5 == 4 else 5), number) for i in range(count)]


def chat(service: Service, number: int) -> list[Took]:
    """A conversation of four turns about an image."""
    chance = random.Random(number)
    messages, found = [user(question(chance, 5), encoded(number))], []
    for _ in range(4):
        found.append(service.ask(messages))
        messages += [{"role": "assistant", "content": found[-1].text}, user(question(chance, 5))]
    return found


def show(what: str, values: list[float]) -> str:
    """Median and the middle half's range, in milliseconds."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{what:40} {1000 * middle:8,.0f} ms  ({1000 * low:,.0f} to {1000 * high:,.0f}, {len(values)})"


def report(name: str, tooks: list[Took]) -> None:
    print(show(f"{name}: first token", [took.first for took in tooks]))
    print(show(f"{name}: CPU", [took.cpu for took in tooks]))


def compare(firsts: list[Took], later: list[Took]) -> None:
    """How much sooner the later first tokens come, and how many of them found a state."""
    for what in ("first", "cpu"):
        ratio = statistics.median(getattr(t, what) for t in firsts) / statistics.median(getattr(t, what) for t in later)
        print(f"{'first, of later: ' + {'first': 'first token', 'cpu': 'CPU'}[what]:40} {ratio:8.1f} times")
    read = statistics.mean(took.prompt - took.cached for took in later)
    print(f"{'found':40} {sum(took.cached > 0 for took in later):8} of {len(later)}")
    print(f"{'tokens read':40} {read:8.1f} of {statistics.mean(took.prompt for took in later):.1f}")


def measure_questions(kept: Service, plain: Service, a: argparse.Namespace) -> None:
    def about(service: Service) -> Callable[[str, int], Took]:
        return lambda text, number: service.ask([user(text, encoded(number))])

    first, *later = one_image(about(kept), a.questions, 0)
    firsts = [first, *(one_image(about(kept), 1, number)[0] for number in range(1, a.rounds))]
    without = one_image(about(plain), a.rounds, 0)
    print(f"\n{a.questions} questions about one image; {a.rounds} first ones, {a.rounds} without")
    report("first", firsts), report("later", later), report("without", without)
    compare(firsts, later)


def measure_chats(kept: Service, plain: Service, a: argparse.Namespace) -> None:
    chats = [chat(kept, 100 + number) for number in range(a.chats)]
    plains = [chat(plain, 100 + number) for number in range(max(a.chats // 10, 1))]
    print(f"\n{a.chats} conversations of four turns, without {len(plains)}")
    for turn in range(4):
        report(f"turn {turn + 1}", [found[turn] for found in chats])
        report(f"turn {turn + 1} without", [found[turn] for found in plains])
    compare([found[0] for found in chats], [turn for found in chats for turn in found[1:]])


def measure_answers(plain: Service, a: argparse.Namespace) -> None:
    together, apart = [], []
    for number in range(200, 200 + a.rounds):
        messages = [user("what?", encoded(number))]
        alone = plain.ask(messages)
        together.append(plain.ask(messages, n=8).cpu / alone.cpu)
        if number == 200:
            apart.append(sum(plain.ask(messages).cpu for _ in range(8)) / alone.cpu)
    print("\n8 answers to one image without any kept state, CPU of one")
    print(f"{'in one request':40} {statistics.median(together):8.2f} times")
    print(f"{'in eight requests':40} {statistics.median(apart):8.2f} times")


def measure_llama(url: str, process: psutil.Process, per_image: int, a: argparse.Namespace) -> None:
    """The same questions and conversations of llama.cpp's server."""
    chance = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(5, 50_000, (count,), generator=chance).tolist()

    def ask(prompt: list[int]) -> tuple[Took, list[int]]:
        body = {"prompt": prompt, "n_predict": TOKENS, "cache_prompt": True, "return_tokens": True, "stream": True}
        call = urllib.request.Request(
            f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        begun, used, first, made = time.perf_counter(), sum(process.cpu_times()[:2]), 0.0, []
        with urllib.request.urlopen(call, timeout=600) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    first = first or time.perf_counter() - begun
                    made += event.get("tokens", [])
        cached = event["timings"]["cache_n"]
        whole = time.perf_counter() - begun
        return Took(first, whole, sum(process.cpu_times()[:2]) - used, len(prompt), cached, ""), made

    image = tokens(per_image)
    first, *later = (ask(image + tokens(16))[0] for _ in range(min(a.questions, 10)))
    firsts = [first, *(ask(tokens(per_image + 16))[0] for _ in range(1, a.rounds))]
    print(f"\nllama.cpp: {1 + len(later)} questions after one beginning of {per_image} tokens")
    report("first", firsts), report("later", later)
    compare(firsts, later)
    opened, turns = [], []
    for _ in range(max(a.chats // 4, 1)):
        prompt = tokens(per_image + 16)
        for turn in range(4):
            took, made = ask(prompt)
            (turns if turn else opened).append(took)
            prompt = [*prompt, *made, *tokens(18)]
    print(f"llama.cpp: {len(opened)} conversations of four turns")
    report("turn 1", opened), report("turns 2 to 4", turns)
    compare(opened, turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--chats", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="images of the questions, and rounds of the answers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--preset", default="130m")
    parser.add_argument("--llama", metavar="PYTHON", help="one with xllamacpp")
    a = parser.parse_args()
    if not NEOX.exists():
        parser.error(NO_NEOX)
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as folder:
        loaded = build(a.preset, a.side, Path(folder) / "model")
        print(
            f"{a.preset}, {loaded[1].tokens_per_image} tokens an image, {a.threads} threads, {TOKENS} tokens an answer"
        )
        with services(loaded, a.threads) as (kept, plain):
            measure_questions(kept, plain, a)
            measure_chats(kept, plain, a)
            measure_answers(plain, a)
        if a.llama:
            convert(Path(folder) / "model", file := Path(folder) / "model.gguf")
            with llama_server(a.llama, file, a.threads) as (url, process):
                measure_llama(url, process, loaded[1].tokens_per_image, a)


if __name__ == "__main__":
    main()
