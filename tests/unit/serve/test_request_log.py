"""Measurements and the request log without Ray. test_serve_metrics.py sees both in a replica of Ray Serve."""

import json
import logging

import pytest

from tests.helpers.processes import wait_for
from tests.helpers.serve_client import data_uri
from tests.helpers.serving import load_tiny, raw, resolved, running, serve
from workflows.serve.engine import Engine
from workflows.serve.metrics import Metrics
from workflows.serve.options import Limits
from workflows.serve.sampling import Answer, Timing
from workflows.serve.service import Served
from workflows.serve.transport import LOGGER

LIMITS = Limits(max_batch=2, default_tokens=8)
HELLO = {"messages": [{"role": "user", "content": "a secret question"}]}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("metrics") / "tiny")


@pytest.fixture
def service(loaded):
    service = serve(loaded, LIMITS)
    yield service
    service.served.engine.close()


@pytest.fixture
def lines():
    """What the request log writes meanwhile."""
    found = []

    class Keep(logging.Handler):
        def emit(self, record):
            found.append(json.loads(record.getMessage()))

    handler = Keep()
    logging.getLogger(LOGGER).addHandler(handler)
    yield found
    logging.getLogger(LOGGER).removeHandler(handler)


def value(service, name, **tags):
    return service.metrics.values.get((name, tuple(sorted(tags.items()))), 0)


def test_an_answer_is_counted_and_timed():
    metrics = Metrics()
    metrics.of_version("m/1").answer(Answer("x", "stop", 10, 5, timing=Timing(0.5, 1.0, 3.0), cached_tokens=4))
    tags = (("version", "m/1"),)
    assert metrics.values == {
        ("mlmamba_prompt_tokens_total", tags): 10,
        ("mlmamba_completion_tokens_total", tags): 5,
        ("mlmamba_cached_tokens_total", tags): 4,
        ("mlmamba_state_cache_hits_total", tags): 1,
        ("mlmamba_queue_seconds_count", tags): 1,
        ("mlmamba_queue_seconds_sum", tags): 0.5,
        ("mlmamba_first_token_seconds_count", tags): 1,
        ("mlmamba_first_token_seconds_sum", tags): 1.0,
        ("mlmamba_token_seconds_count", tags): 1,
        ("mlmamba_token_seconds_sum", tags): 0.5,
    }


def test_an_answer_that_found_no_kept_state_is_counted_as_such():
    metrics = Metrics()
    metrics.answer(Answer("x", "stop", 10, 5))
    names = {name for (name, _), value in metrics.values.items() if value}
    assert "mlmamba_state_cache_misses_total" in names
    assert "mlmamba_state_cache_hits_total" not in names


def test_the_load_is_sent_seldom_but_always_when_idle():
    metrics = Metrics()
    for _ in range(100):
        metrics.load(3, 2)
        metrics.load(2, 2)
    key = ("mlmamba_waiting_requests", (("version", ""),))
    assert metrics.values[key] == 3  # the first; the others came within half a second
    metrics.load(0, 0)
    assert metrics.values[key] == 0


def test_requests_of_a_service(service):
    version = {"version": "shapes/3"}
    with running(service) as url:
        made = raw(url, "/v1/chat/completions", HELLO)[2]["usage"]
        raw(url, "/v1/chat/completions", {})
        wait_for(lambda: value(service, "mlmamba_requests_total", status="400", **version) == 1)
    assert value(service, "mlmamba_requests_total", status="200", **version) == 1
    wait_for(lambda: value(service, "mlmamba_completion_tokens_total", **version) == made["completion_tokens"])
    assert value(service, "mlmamba_prompt_tokens_total", **version) == made["prompt_tokens"]
    assert value(service, "mlmamba_first_token_seconds_count", **version) == 1
    assert 0 < value(service, "mlmamba_first_token_seconds_sum", **version) < 60
    wait_for(lambda: value(service, "mlmamba_slots_in_use", **version) == 0)


def test_a_new_version_takes_over(service, loaded):
    old = service.served
    service.served = Served(Engine(*loaded, LIMITS, 1), resolved("4"))
    assert value(service, "mlmamba_model_info", version="shapes/3") == 0
    assert value(service, "mlmamba_model_info", version="shapes/4") == 1
    old.engine.close()


def test_a_line_for_each_request_without_what_was_asked(service, lines):
    image = {"type": "image_url", "image_url": {"url": data_uri(b"no image")}}
    bad = {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "a secret question"}]}]}
    with running(service) as url:
        answer = raw(url, "/v1/chat/completions", HELLO)[2]
        raw(url, "/v1/chat/completions", bad)
        raw(url, "/a-secret-path")
        raw(url, "/healthz")
        wait_for(lambda: len(lines) == 3)
    first, second, third = lines
    assert (first["status"], first["version"], first["id"], first["stream"]) == (200, "shapes/3", answer["id"], False)
    assert first["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert 0 < first["first_token_seconds"] <= first["seconds"]
    assert (second["status"], second["path"]) == (400, "/v1/chat/completions")
    assert (third["status"], third["path"]) == (404, "other")
    text = json.dumps(lines)
    assert "secret" not in text
    assert not (said := answer["choices"][0]["message"]["content"]) or said not in text
