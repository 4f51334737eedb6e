"""Exact answers over HTTP under load: those that an evaluation gets, with kept states and without, to the last bit."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mlmamba.answering import Answerer, Asked
from mlmamba.loading import load_model
from tests.helpers.images import encoded
from tests.helpers.serve_client import data_uri, request
from tests.helpers.serving import raw, running, save_tiny, serve
from workflows.serve.options import Limits

IMAGES, TOKENS, CLIENTS = 60, 6, 8
WORDS = ("what", "is", "shown", "red", "circle", "?", "where")


def questions() -> list[tuple[int, str]]:
    """An image's number and a question, five of each, of very different lengths."""
    chance = random.Random(0)
    return [(i % IMAGES, " ".join(chance.choices(WORDS, k=chance.randint(1, 20)))) for i in range(5 * IMAGES)]


@pytest.fixture
def folder(tmp_path, compiled_cache, monkeypatch):
    monkeypatch.setenv("MLMAMBA_CACHE", str(compiled_cache))
    torch.set_num_threads(1)
    return save_tiny(tmp_path / "model")


def served(folder, limits: Limits, asked: list[tuple[int, str]], clients: int) -> list[tuple[str, str]]:
    """Answers and their log probabilities as JSON, in the order of the questions."""
    service = serve(load_model(folder, exact=True), limits)

    def ask(url: str, image: int, text: str) -> tuple[str, str]:
        parts = [{"type": "image_url", "image_url": {"url": data_uri(encoded(image))}}, {"type": "text", "text": text}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": TOKENS, "logprobs": True}
        choice = request(url, "/v1/chat/completions", body)["choices"][0]
        return choice["message"]["content"].strip(), json.dumps(choice["logprobs"])

    try:
        with running(service) as url, ThreadPoolExecutor(clients) as pool:
            (entry,) = raw(url, "/v1/models")[2]["data"]
            assert entry["computes_in"].endswith(", exact")
            return list(pool.map(lambda one: ask(url, *one), asked))
    finally:
        service.served.engine.close()


def test_answers_over_http_under_load_are_those_of_an_evaluation_to_the_last_bit(folder):
    asked = questions()
    by_image = [Asked(encoded(i), [text for image, text in asked if image == i]) for i in range(IMAGES)]
    evaluated = []
    for size in (1, 16):
        answerer = Answerer(folder, TOKENS, 1, batch_questions=size, exact=True)
        groups = [by_image[i : i + size] for i in range(0, IMAGES, size)]
        evaluated.append([texts for group in groups for texts in answerer.answer(group)])
    assert evaluated[0] == evaluated[1]
    order = [iter(texts) for texts in evaluated[0]]
    expected = [next(order[image]) for image, _ in asked]
    assert len(set(expected)) > 100
    loaded = served(folder, Limits(), asked, CLIENTS)
    assert [text for text, _ in loaded] == expected
    one_by_one = served(folder, Limits(state_cache_bytes=0, prefill_tokens=7, max_batch=1), asked[::5], 1)
    assert one_by_one == loaded[::5]
    without = served(
        folder, Limits(state_cache_bytes=0, images_at_once=3), random.Random(1).sample(asked, 100), CLIENTS
    )
    assert set(without) <= set(loaded)


def test_a_conversation_goes_on_from_kept_states_with_the_same_bits(folder):
    """Also from the state after an answer, which was made token by token."""
    found = []
    for limits in (Limits(), Limits(state_cache_bytes=0, prefill_tokens=5)):
        service = serve(load_model(folder, exact=True), limits)
        try:
            with running(service) as url:
                messages, turns = [], []
                for text in ("what is it?", "and where?", "how many are there?"):
                    messages.append({"role": "user", "content": text})
                    body = {"messages": messages, "max_tokens": TOKENS, "logprobs": True, "temperature": 1, "seed": 3}
                    reply = request(url, "/v1/chat/completions", body)
                    (choice,), usage = reply["choices"], reply["usage"]
                    messages.append({"role": "assistant", "content": choice["message"]["content"]})
                    turns.append((choice["message"]["content"], json.dumps(choice["logprobs"])))
                found.append(turns)
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                assert (cached > 0) == (limits.state_cache_bytes > 0)
        finally:
            service.served.engine.close()
    assert found[0] == found[1]
