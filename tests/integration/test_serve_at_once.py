"""Ray Serve's own proxy with the limit on one client's requests at once, before an application that holds them."""

import asyncio
import http.client

import pytest
import ray
from ray import serve

from tests.helpers.processes import free_port
from workflows.serve.proxy import CALLBACK, MOST_VARIABLE, VARIABLE


@serve.deployment(max_ongoing_requests=100)
class Holds:
    async def __call__(self, request) -> str:
        if request.url.path == "/hold":
            await asyncio.sleep(3600)
        return "answered"


@pytest.fixture
def port(monkeypatch):
    ray.shutdown()
    monkeypatch.setenv(VARIABLE, CALLBACK)  # as serve_model does, before Ray starts
    monkeypatch.setenv(MOST_VARIABLE, "4")
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(Holds.bind(), name="holds")
    yield port
    serve.shutdown()
    ray.shutdown()


def begin(port, path, key) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
    return connection


def status(port, path="/", key="other") -> int:
    connection = begin(port, path, key)
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_client_that_holds_its_requests_is_refused_the_next_and_no_other_one_is(port):
    assert status(port, key="busy") == 200
    held = [begin(port, "/hold", "busy") for _ in range(4)]
    refused = begin(port, "/hold", "busy").getresponse()
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert b"too_many_at_once" in refused.read()
    assert status(port) == status(port, "/healthz", "busy") == 200
    for connection in held:
        connection.close()
    codes = (status(port, key="busy") for _ in range(200))
    assert 200 in codes  # as soon as the proxy has seen that they are gone
