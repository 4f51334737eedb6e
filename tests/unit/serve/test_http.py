"""The HTTP interface without Ray: a real server (uvicorn) on loopback, before a model is loaded, and with one that is
held back. tests/integration/test_serve.py has the same on Ray Serve, with the answers themselves."""

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from mlmamba.loading import load_model
from tests.helpers.serving import raw, running
from tests.helpers.tiny import images, tiny_model, tiny_tokenizer
from workflows.registry import ResolvedModel
from workflows.serve.client import ServiceError, ask, request
from workflows.serve.engine import Engine
from workflows.serve.http import Served, Service
from workflows.serve.options import Limits
from workflows.train.initial import save

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
LIMITS = Limits(max_batch=2, max_waiting=2, max_tokens=32, default_tokens=6, body_bytes=100_000)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    save(tiny_model(max_position_embeddings=300), tiny_tokenizer(), folder)
    return load_model(folder)


@pytest.fixture
def service(loaded):
    service = Service(LIMITS)
    engine = Engine(*loaded, LIMITS, threads=1)
    service.served = Served(engine, ResolvedModel(Path("somewhere"), "shapes", "3", "run0123"))
    yield service
    engine.close()


@pytest.fixture
def url(service):
    with running(service) as url:
        yield url


def test_before_the_model_is_loaded():
    with running(Service(LIMITS)) as url:
        assert raw(url, "/healthz")[0] == 200
        assert raw(url, "/readyz")[0] == 503
        status, headers, content = raw(url, "/v1/chat/completions", HELLO)
        assert (status, content["error"]["code"], headers["Retry-After"]) == (503, "model_loading", "5")
        assert raw(url, "/v1/models")[0] == 503


def test_an_answer_says_which_model_gave_it(url):
    status, headers, content = raw(url, "/v1/chat/completions", HELLO)
    assert status == 200
    assert (headers["x-model-version"], headers["x-model-run-id"]) == ("shapes/3", "run0123")
    assert (content["model"], content["system_fingerprint"]) == ("shapes", "shapes/3")
    assert content["object"] == "chat.completion"
    assert content["usage"]["completion_tokens"] <= 4
    assert content["usage"]["total_tokens"] == sum(content["usage"][f"{k}_tokens"] for k in ("prompt", "completion"))


def test_without_max_tokens_the_default_holds(url):
    body = {"messages": HELLO["messages"], "temperature": 2.0, "seed": 1}
    assert raw(url, "/v1/chat/completions", body)[2]["usage"]["completion_tokens"] <= LIMITS.default_tokens


@pytest.mark.parametrize("name", ["shapes", "shapes/3", None])
def test_the_model_may_be_named(url, name):
    assert raw(url, "/v1/chat/completions", {**HELLO, "model": name})[0] == 200


def test_another_model_is_not_found(url):
    status, headers, content = raw(url, "/v1/chat/completions", {**HELLO, "model": "shapes/2"})
    assert (status, content["error"]["param"], headers["x-model-version"]) == (404, "model", "shapes/3")
    assert "'shapes'" in content["error"]["message"]


def test_models_and_health(url):
    entry = raw(url, "/v1/models")[2]["data"][0]
    assert (entry["id"], entry["version"], entry["run_id"]) == ("shapes", "3", "run0123")
    for path in ("/healthz", "/readyz"):
        status, headers, _ = raw(url, path)
        assert (status, headers["x-model-version"]) == (200, "shapes/3")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405)])
def test_unknown_paths_and_methods(url, method, path, status):
    answered, headers, content = raw(url, path, method=method)
    assert (answered, headers["x-model-version"]) == (status, "shapes/3")
    assert f"{method} {path}" in content["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 33}, "max_tokens = 33 is over this server's limit of 32"),
        ({"max_tokens": 4, "max_completion_tokens": 99}, "max_completion_tokens = 99"),
        ({"messages": [{"role": "user", "content": "long " * 300}]}, "over the limit of 300"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "empty"),
        ({"messages": [{"role": "user", "content": "say <|endoftext|>"}]}, "a mark of the prompt format"),
        ({"n": 99}, "n = 99 is over this server's limit of 8"),
        ({"top_logprobs": 2}, "set logprobs to true"),
        ({"stream_options": {"include_usage": True}}, "only for a request with stream"),
    ],
)
def test_requests_that_the_model_cannot_answer(url, fields, message):
    status, _, content = raw(url, "/v1/chat/completions", {**HELLO, **fields})
    assert status == 400
    assert message in content["error"]["message"]
    assert content["error"]["type"] == "invalid_request_error"


def test_a_body_over_the_limit(url):
    body = {"messages": [{"role": "user", "content": "x" * 200_000}]}
    assert raw(url, "/v1/chat/completions", body)[0] == 413
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)  # length not announced
    pieces = (b"x" * 10_000 for _ in range(11))
    connection.request("POST", "/v1/chat/completions", pieces, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_full_queue_says_when_to_come_back(url, loaded, monkeypatch):
    model, original, opened, begun = loaded[0], loaded[0].forward, threading.Event(), threading.Event()

    def forward_when_open(**kwargs):
        begun.set()
        assert opened.wait(60)
        return original(**kwargs)

    monkeypatch.setattr(model, "forward", forward_when_open)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(raw, url, "/v1/chat/completions", {**HELLO, "n": 2})
        assert begun.wait(60)
        others = [pool.submit(raw, url, "/v1/chat/completions", HELLO) for _ in range(5)]
        refused = []
        while len(refused) < 3:  # two of the five wait, three are refused at once
            refused = [future.result() for future in others if future.done()]
        assert raw(url, "/healthz")[0] == 200
        opened.set()
        assert [first.result()[0], *sorted(future.result()[0] for future in others)] == [200, 200, 200, 429, 429, 429]
    for _, headers, content in refused:
        assert int(headers["Retry-After"]) >= 1
        assert (content["error"]["type"], content["error"]["code"]) == ("rate_limit_error", "queue_full")


def test_a_failing_model_is_a_500_that_tells_nothing(url, loaded, monkeypatch, caplog):
    def fail(**kwargs):
        raise RuntimeError(f"cannot answer {'secret'.upper()}")

    with monkeypatch.context() as patch:
        patch.setattr(loaded[0], "forward", fail)
        status, _, content = raw(url, "/v1/chat/completions", HELLO)
    assert (status, content["error"]["type"], content["error"]["code"]) == (500, "server_error", "internal")
    assert "RuntimeError" in caplog.text
    assert "SECRET" not in caplog.text + json.dumps(content)
    assert raw(url, "/v1/chat/completions", HELLO)[0] == 200


def test_an_engine_that_stops_is_not_ready(url, service):
    service.served.engine.close()
    assert raw(url, "/readyz")[0] == 503
    status, _, content = raw(url, "/v1/chat/completions", HELLO)
    assert (status, content["error"]["code"]) == (503, "model_stopping")


def test_the_client(url, tmp_path):
    file = tmp_path / "a.jpg"
    Image.fromarray(images(1)[0].permute(1, 2, 0).numpy()).save(file)
    from_file = ask(url, "what?", file, max_tokens=8)
    assert (
        from_file
        == ask(url + "/", "what?", str(file), max_tokens=8)
        == ask(url, "what?", file.read_bytes(), max_tokens=8)
    )
    assert isinstance(ask(url, "what?", max_tokens=8), str)
    with pytest.raises(ServiceError, match="no text") as caught:
        ask(url, " ")
    assert (caught.value.status, caught.value.code) == (400, "empty_message")
    with pytest.raises(ServiceError, match="Not Found"):
        request(url, "/nowhere")
