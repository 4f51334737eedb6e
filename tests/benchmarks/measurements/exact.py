"""Exact answers to all questions of a recipe's test sources: are they the same in any company, and what do they cost?

python -m tests.benchmarks.measurements.exact [--recipe quickstart] [--images N] [--clients 8] [--threads 1]
        [--model FOLDER] [--precision auto]

The questions are asked as `evaluate` asks, at batches of 1 and of 16, and over HTTP (uvicorn and the whole interface in
this process) by some clients at once, with kept states and without. Without --model the recipe's own model is asked,
its language model and connector with random weights, whose answers are noise that the last bit can change. Printed are
how many answers are those at batches of 1, and the CPU seconds of each way beside the same way without exactness, in
turns on the first images. Exits 1 where an answer differs.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from mlmamba.answering import Answerer, Asked
from mlmamba.loading import load_model
from tests.helpers.serve_client import ask
from tests.helpers.serving import running, serve
from tests.helpers.tiny import tiny_tokenizer
from workflows.evaluate.benchmarks.own_data import TestSources
from workflows.evaluate.questions import open_store
from workflows.recipe.load import load_recipe
from workflows.serve.auth import Access
from workflows.serve.options import Limits
from workflows.train.initial import build_initial

TOKENS, ROUNDS, PART = 4, 3, 100
Answers = list[list[str]]
Ask = Callable[[list[Asked]], Answers]
Way = Callable[[Path, argparse.Namespace, bool], AbstractContextManager[Ask]]


def questions(recipe, images: int | None) -> list[Asked]:
    """The test images, each with its questions."""
    sources = TestSources(recipe)
    stores = [open_store(store) for store in sources.stores]
    return [Asked(stores[one.source].read(one.location), one.questions) for one in sources.listed[:images]]


def built(recipe, folder: Path) -> Path:
    """The recipe's untrained model, its weights enlarged so that every word and image changes what it says."""
    tiny_tokenizer().save_pretrained(folder.with_name("data") / "tokenizer")
    build_initial(recipe, folder.with_name("data"), folder)
    model, _ = load_model(folder)
    with torch.no_grad():
        for parameter in (*model.connector.parameters(), *model.language_model.parameters()):
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


@contextmanager
def over_http(folder: Path, a: argparse.Namespace, limits: Limits, exact: bool) -> Iterator[Ask]:
    """A service, asked by clients at once."""
    loaded = load_model(folder, precision=a.precision, exact=exact)
    service = serve(loaded, limits, Access(log_requests=False), threads=a.threads)

    def answers(asked: list[Asked]) -> Answers:
        rows = [(number, text, one.image) for number, one in enumerate(asked) for text in one.questions]
        texts = list(pool.map(lambda row: ask(url, row[1], row[2], max_tokens=TOKENS).strip(), rows))
        found: Answers = [[] for _ in asked]
        for (number, _, _), text in zip(rows, texts, strict=True):
            found[number].append(text)
        return found

    try:
        with running(service) as url, ThreadPoolExecutor(a.clients) as pool:
            yield answers
    finally:
        service.served.engine.close()


def cpu(ask: Ask, asked: list[Asked]) -> float:
    begun = time.process_time()
    ask(asked)
    return time.process_time() - begun


def measure(folder: Path, a: argparse.Namespace, asked: list[Asked]) -> None:
    """What exactness costs: CPU seconds with it and without, in turns, the ratio of medians."""
    for name, way in WAYS.items():
        with way(folder, a, True) as exact, way(folder, a, False) as plain:
            pairs = [(cpu(exact, asked), cpu(plain, asked)) for _ in range(ROUNDS + 1)][1:]  # the first warms up
        ratios = sorted(one / other for one, other in pairs)
        middle = ratios[len(ratios) // 2]
        print(f"{name}: exact costs {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times the CPU", flush=True)


def evaluate_at(size: int) -> Way:
    """As `evaluate` asks, so many images and questions at once."""

    @contextmanager
    def way(folder: Path, a: argparse.Namespace, exact: bool) -> Iterator[Ask]:
        answerer = Answerer(folder, TOKENS, a.threads, batch_questions=size, precision=a.precision, exact=exact)

        def answers(asked: list[Asked]) -> Answers:
            groups = [asked[first : first + size] for first in range(0, len(asked), size)]
            return [texts for group in groups for texts in answerer.answer(group)]

        yield answers

    return way


WAYS = {
    "evaluate, batches of 1": evaluate_at(1),
    "evaluate, batches of 16": evaluate_at(16),
    "HTTP, kept states": lambda folder, a, exact: over_http(folder, a, Limits(), exact),
    "HTTP, none kept": lambda folder, a, exact: over_http(folder, a, Limits(state_cache_bytes=0), exact),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--images", type=int, help="ask about the first so many only")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--precision", default="auto")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    recipe = load_recipe(a.recipe, [])
    asked = questions(recipe, a.images)
    with tempfile.TemporaryDirectory() as place:
        folder = a.model or built(recipe, Path(place) / "model")
        found = {}
        for name, way in WAYS.items():
            with way(folder, a, True) as ask_all:
                found[name] = [text for texts in ask_all(asked) for text in texts]
            report(name, found)
        with evaluate_at(16)(folder, a, False) as ask_all:
            plain = [text for texts in ask_all(asked) for text in texts]
        report("not exact, batches of 16", found, plain)
        print(f"{len(set(plain)):,} different answers")
        measure(folder, a, asked[:PART])
    first, *others = found.values()
    return int(any(own != first for own in others))


def report(name: str, found: dict[str, list[str]], own: list[str] | None = None) -> None:
    first, own = next(iter(found.values())), found[name] if own is None else own
    equal = sum(one == other for one, other in zip(own, first, strict=True))
    print(f"{name}: {equal:,} of {len(own):,} answers are those at batches of 1", flush=True)


if __name__ == "__main__":
    sys.exit(main())
