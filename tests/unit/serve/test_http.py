"""The HTTP interface without Ray: a real server (uvicorn) on loopback, before a model is loaded, and with one that is
held back. tests/integration/test_serve.py has the same on Ray Serve, with the answers themselves."""

import asyncio
import gzip
import http.client
import json
import re
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import mlmamba
from mlmamba.loading import load_model
from tests.helpers.images import encoded
from tests.helpers.serve_client import ServiceError, ask, data_uri, request
from tests.helpers.serving import raw, running, serve
from tests.helpers.tiny import PER_IMAGE, images, tiny_model, tiny_tokenizer
from workflows.registry import ResolvedModel
from workflows.serve.auth import Access
from workflows.serve.engine import Engine
from workflows.serve.http import build_app
from workflows.serve.intake import Bodies
from workflows.serve.openai import ApiError
from workflows.serve.options import Limits
from workflows.serve.service import Served, Service
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


def test_a_key_holder_finds_what_was_kept_of_its_own_questions_alone(service, tmp_path):
    (tmp_path / "keys").write_text("k1\nk2\n")
    guarded = Service(LIMITS, Access(api_keys_file=str(tmp_path / "keys")))
    guarded.served = service.served
    shown = {"type": "image_url", "image_url": {"url": data_uri(encoded(1))}}
    with running(guarded) as url:

        def cached(key, text, n=1):
            content = [shown, {"type": "text", "text": text}]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "n": n}
            reply = raw(url, "/v1/chat/completions", body, headers={"Authorization": f"Bearer {key}"})[2]
            return reply["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [cached("k1", "what?"), cached("k1", "who?"), cached("k1", "where?", n=2)] == [0, PER_IMAGE, PER_IMAGE]
        assert cached("k2", "what?") == 0
        assert cached("k2", "what?") > PER_IMAGE


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
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", pieces, headers, encode_chunked=True)
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
    with pytest.raises(ServiceError, match="neither text nor image") as caught:
        ask(url, " ")
    assert (caught.value.status, caught.value.code) == (400, "empty_message")
    with pytest.raises(ServiceError, match="Not Found"):
        request(url, "/nowhere")


HOSTILE = {
    "a list of numbers as content": b'{"messages":[{"role":"user","content":[%s1]}]}' % (b"1," * 40_000),
    "numbers as messages": b'{"messages":[%s1]}' % (b"1," * 40_000),
    "objects as messages": b'{"messages":[%s{}]}' % (b"{}," * 30_000),
    "an unknown field of numbers": b'{"x":[%s1],"messages":[]}' % (b"1," * 40_000),
    "more values than any request": b'{"x":[%s1],"messages":[{"role":"user","content":"hi"}]}' % (b"1," * 60_000),
    "nested lists": b'{"messages":' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "nested objects": b'{"a":' * 15_000 + b"1" + b"}" * 15_000,
    "a long number": b'{"messages":[{"role":"user","content":"hi"}],"seed":' + b"9" * 90_000 + b"}",
    "a long number in an unknown field": b'{"messages":[{"role":"user","content":""}],"x":' + b"9" * 90_000 + b"}",
    "nested placeholders": json.dumps(
        {"messages": [{"role": "user", "content": "<ima" * 9_000 + "<image>" + "ge>" * 9_000}]}
    ).encode(),
    "many empty parts": b'{"messages":[{"role":"user","content":[%s{"type":"text","text":""}]}]}'
    % (b'{"type":"text","text":""},' * 3_000),
    "many messages": b'{"messages":[%s{"role":"user","content":"a"}]}' % (b'{"role":"system","content":"a"},' * 2_000),
    "text over the limit": json.dumps({"messages": [{"role": "user", "content": "word " * 10_000}]}).encode(),
    "half a surrogate": b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    "not text": b"\xff\xfe" * 1000,
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bodies_are_refused_at_little_cost(loaded, body):
    """CPU time, of the whole process: the largest of these took 0.8 s in the first version, for 80 kB."""
    service = Service(Limits(text_bytes=40_000, messages=1_000))
    service.served = Served(Engine(*loaded, LIMITS, threads=1), ResolvedModel(Path("somewhere"), "shapes", "3", "run0"))
    with running(service) as url:
        began = time.process_time()
        status, _, content = raw(url, "/v1/chat/completions", body)
        spent = time.process_time() - began
    service.served.engine.close()
    assert status == 400, content
    assert len(content["error"]["message"]) < 1_000
    assert spent < 0.5


def test_behind_a_prefix_keys_are_asked_for_as_well(loaded, tmp_path):
    (tmp_path / "keys").write_text("k1\n")
    service = Service(LIMITS, Access(api_keys_file=str(tmp_path / "keys")))
    with running(service, root_path="/llm") as url:  # uvicorn puts it before the path, as Ray Serve does
        assert raw(url, "/healthz")[0] == 200
        for path in ("/v1/models", "/v1/swap", "/llm/v1/models", "//v1/models"):
            assert raw(url, path)[0] == 401, path
        assert raw(url, "/v1/models", headers={"Authorization": "Bearer k1"})[0] == 503  # no model yet


def test_the_openapi_document_describes_request_and_errors(url):
    status, _, document = raw(url, "/openapi.json")
    assert status == 200
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    schema = document["components"]["schemas"]["ChatRequest"]
    assert {"messages", "max_tokens", "temperature", "stop", "logprobs"} <= schema["properties"].keys()
    assert schema["required"] == ["messages"]
    referred = set(re.findall(r"#/[\w/$]+", json.dumps(document)))
    assert referred  # and each leads somewhere
    for reference in referred:
        found = document
        for step in reference.split("/")[1:]:
            found = found[step]
    assert chat["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")


def test_a_question_of_text_does_not_wait_for_images(url, service):
    """Both readers of images are held; a text is read beside them."""
    opened, held = threading.Event(), threading.Semaphore(0)

    def hold():
        held.release()
        assert opened.wait(60)

    async def block():
        await asyncio.gather(*(service._image_readers.run("other", hold) for _ in range(2)))

    blocker = threading.Thread(target=lambda: asyncio.run(block()))
    blocker.start()
    for _ in range(2):
        assert held.acquire(timeout=60)
    assert raw(url, "/v1/chat/completions", HELLO)[0] == 200
    opened.set()
    blocker.join()


def test_head_is_answered_as_get(url):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    for path, status in (("/healthz", 200), ("/v1/models", 200), ("/nowhere", 404)):
        connection.request("HEAD", path)
        reply = connection.getresponse()
        assert (reply.status, reply.read()) == (status, b"")
        assert reply.headers["x-model-version"] == "shapes/3"
    connection.close()


def test_the_list_of_models_may_end_in_a_slash(url):
    assert raw(url, "/v1/models/")[2] == raw(url, "/v1/models")[2]


def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(url):
    body = {**HELLO, "messages": [{"role": "user", "content": "long " * 300}]}
    assert raw(url, "/v1/chat/completions", body)[2]["error"]["code"] == "context_length_exceeded"


def zipped(url, body, encoding="gzip"):
    status, headers, content = raw(url, "/v1/chat/completions", body, headers={"Content-Encoding": encoding})
    return status, content.get("error", {}).get("code"), headers


def test_a_body_that_gzip_compressed_is_read(url, service):
    plain = json.dumps(HELLO).encode()
    for body in (gzip.compress(plain), gzip.compress(plain[:9]) + gzip.compress(plain[9:])):
        assert zipped(url, body, "GZIP")[0] == 200
    assert raw(url, "/tokenize", gzip.compress(b'{"prompt":"a"}'), headers={"Content-Encoding": "x-gzip"})[0] == 200
    status, code, headers = zipped(url, plain, "br")
    assert (status, code, headers["Accept-Encoding"]) == (415, "content_encoding", "gzip")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (gzip.compress(b" " * 50_000_000), 413, "too_large"),
        (b"".join(gzip.compress(b" " * 60_000) for _ in range(9)), 413, "too_large"),
        (gzip.compress(json.dumps(HELLO).encode())[:-9], 400, "invalid_gzip"),
        (gzip.compress(json.dumps(HELLO).encode()) + b"more", 400, "invalid_gzip"),
        (json.dumps(HELLO).encode(), 400, "invalid_gzip"),
        (b"", 400, "invalid_json"),
        (gzip.compress(b"{"), 400, "invalid_json"),
    ],
    ids=["a bomb", "several", "cut", "more behind it", "not gzip", "nothing", "no JSON"],
)
def test_a_bomb_and_what_is_no_gzip_are_refused(url, body, status, code):
    assert zipped(url, body)[:2] == (status, code)
    assert raw(url, "/v1/chat/completions", HELLO)[0] == 200


def test_bodies_are_counted_until_they_are_released():
    bodies = Bodies(Limits(held_bytes=100))
    bodies.hold(90)
    with pytest.raises(ApiError, match="too many large requests"):
        bodies.hold(20)
    bodies.release(90)
    assert bodies.held == 0


def test_what_other_servers_clients_ask_for(url):
    assert raw(url, "/health")[:1] == (200,)
    assert raw(url, "/version")[2] == {"version": mlmamba.__version__}
    (entry,) = raw(url, "/v1/models")[2]["data"]
    assert (entry["max_model_len"], entry["state_cache_bytes"]) == (300, LIMITS.state_cache_bytes)
    for path in ("/v1/completions", "/v1/responses", "/v1/embeddings", "/completions"):
        status, _, content = raw(url, path, {"prompt": "x"})
        assert (status, content["error"]["code"]) == (404, "not_found")
        assert content["error"]["message"].startswith(f"POST {path}: ")
        assert "POST /v1/chat/completions" in content["error"]["message"]


def test_the_model_by_other_names(loaded):
    service = Service(LIMITS, names=("gpt-shapes", "second"))
    service.served = Served(Engine(*loaded, LIMITS, threads=1), ResolvedModel(Path("somewhere"), "shapes", "3", "run0"))
    with running(service) as url:
        entry = raw(url, "/v1/models")[2]["data"][0]
        assert (entry["id"], entry["label"]) == ("gpt-shapes", "shapes/3")
        for name in ("gpt-shapes", "second", "shapes/3"):
            answer = raw(url, "/v1/chat/completions", {**HELLO, "model": name})[2]
            assert (answer["model"], answer["system_fingerprint"]) == ("gpt-shapes", "shapes/3")
            assert raw(url, f"/v1/models/{name}")[2]["id"] == name
        status, _, content = raw(url, "/v1/chat/completions", {**HELLO, "model": "shapes"})
        assert (status, "ask for 'gpt-shapes'" in content["error"]["message"]) == (404, True)
    service.served.engine.close()


def test_a_prompt_limit_below_the_models(loaded):
    limits = LIMITS.model_copy(update={"max_model_len": 40})
    service = Service(limits)
    service.served = Served(Engine(*loaded, limits, threads=1), ResolvedModel(Path("somewhere"), "shapes", "3", "run0"))
    with running(service) as url:
        assert raw(url, "/v1/models")[2]["data"][0]["max_model_len"] == 40
        assert raw(url, "/v1/chat/completions", HELLO)[0] == 200
        long = {"messages": [{"role": "user", "content": "a" * 30}]}
        status, _, content = raw(url, "/v1/chat/completions", long)
        assert (status, content["error"]["code"]) == (400, "context_length_exceeded")
        assert "over the limit of 40" in content["error"]["message"]
    service.served.engine.close()


def test_measurements_for_prometheus(loaded, tmp_path):
    (tmp_path / "keys").write_text("k1\n")
    service = Service(LIMITS, Access(api_keys_file=str(tmp_path / "keys")))
    service.served = Served(Engine(*loaded, LIMITS, threads=1), ResolvedModel(Path("somewhere"), "shapes", "3", "run0"))
    with running(service) as url:
        key = {"Authorization": "Bearer k1"}
        assert raw(url, "/metrics")[0] == 401
        assert raw(url, "/v1/chat/completions", HELLO, headers=key)[0] == 200
        with urllib.request.urlopen(urllib.request.Request(url + "/metrics", headers=key)) as reply:
            assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
            text = reply.read().decode()
    service.served.engine.close()
    found = {
        (sample.name, sample.labels.get("status"), sample.labels["version"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["mlmamba_requests_total", "200", "shapes/3"] == 1
    assert found["mlmamba_request_seconds_count", None, "shapes/3"] == 2
    assert found["mlmamba_model_info", None, "shapes/3"] == 1


def test_under_a_path_that_a_proxy_takes_away_or_leaves(loaded, tmp_path):
    (tmp_path / "keys").write_text("k1\n")
    service = Service(LIMITS, Access(api_keys_file=str(tmp_path / "keys")))
    service.served = Served(Engine(*loaded, LIMITS, threads=1), ResolvedModel(Path("somewhere"), "shapes", "3", "run0"))
    key = {"Authorization": "Bearer k1"}
    with running(service, application=build_app(service, "/llm")) as url:
        for prefix in ("", "/llm"):
            assert raw(url, prefix + "/healthz")[0] == 200
            assert raw(url, prefix + "/v1/models")[0] == 401
            assert raw(url, prefix + "/v1/chat/completions", HELLO, headers=key)[0] == 200
        assert raw(url, "/llm/openapi.json")[2]["servers"] == [{"url": "/llm"}]
        assert raw(url, "/llm/llm/v1/models", headers=key)[0] == 404
    service.served.engine.close()


def test_pages_of_named_sites_may_ask(loaded):
    site = "https://chat.example.com"
    service = Service(LIMITS, Access(origins=(site,)))
    service.served = Served(Engine(*loaded, LIMITS, threads=1), ResolvedModel(Path("somewhere"), "shapes", "3", "run0"))
    with running(service) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)

        def asked(origin, method="POST"):
            headers = {"Origin": origin, "Content-Type": "application/json"}
            if method == "OPTIONS":
                headers |= {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
            connection.request(method, "/v1/chat/completions", json.dumps(HELLO), headers)
            reply = connection.getresponse()
            reply.read()
            return reply.status, reply.headers["access-control-allow-origin"]

        assert asked(site, "OPTIONS") == (200, site)
        assert asked(site) == (200, site)
        assert asked("https://evil.example", "OPTIONS") == (400, None)
        assert asked("https://evil.example") == (403, None)
        connection.close()
    service.served.engine.close()
    with pytest.raises(ValueError, match="API keys are needed"):
        Service(LIMITS, Access(origins=("*",)))


def test_the_entry_of_a_model_says_why_no_states_are_kept(loaded):
    limits = LIMITS.model_copy(update={"state_cache_bytes": 1000})
    service = serve(loaded, limits)
    with running(service) as url:
        ask(url, "hello")
        (entry,) = request(url, "/v1/models")["data"]
    service.served.engine.close()
    assert entry["state_cache_bytes"] == 0
    assert entry["state_cache_problem"].startswith(
        "limits.state_cache_bytes = 1,000 is less than one state of this model"
    )


@pytest.mark.slow
def test_ten_thousand_images_leave_kept_states_and_memory_under_their_limit(loaded):
    """Ten times as many states as there is room for, twice: what the first half took is given back to the second."""
    limits = LIMITS.model_copy(update={"state_cache_bytes": 16 * 2**20, "max_waiting": 16})
    service, memory, kept = serve(loaded, limits, Access(log_requests=False)), [], []
    with running(service) as url, ThreadPoolExecutor(8) as pool:
        for half in range(2):
            numbers = range(5000 * half, 5000 * (half + 1))
            list(pool.map(lambda number: ask(url, "?", encoded(number, size=(4, 4)), max_tokens=1), numbers))
            kept.append(service.served.engine.kept_bytes)
            memory.append(psutil.Process().memory_info().rss)
    service.served.engine.close()
    assert all(limits.state_cache_bytes // 2 < own <= limits.state_cache_bytes for own in kept)
    assert memory[1] - memory[0] < 2 * limits.state_cache_bytes
