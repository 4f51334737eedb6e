"""A replica of Ray Serve: its measurements on Ray's Prometheus endpoint, its request log, and clients that leave."""

import http.client
import json
import re
import socket
import subprocess
import urllib.error
import urllib.request

import openai
import pytest
import ray
import torch
from ray import serve

from tests.helpers.images import encoded
from tests.helpers.processes import free_port, wait_for
from tests.helpers.serve_client import ask
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from workflows.serve.deployment import ServeOptions, application
from workflows.serve.options import Limits
from workflows.train.initial import save

pytestmark = pytest.mark.slow
LIMITS = Limits(max_batch=4, max_tokens=100_000, default_tokens=8)


@pytest.fixture(scope="module")
def ports(tmp_path_factory):
    """Ports of the service and of Ray's metrics. The model's answers end by their length alone."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("metrics") / "endless"
    model = tiny_model({"tie_word_embeddings": False}, max_position_embeddings=300)
    model.generation_config.eos_token_id = 10**6
    save(model, tiny_tokenizer(), folder)
    asked, measured = free_port(), free_port()
    ray.shutdown()
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=measured,
        _system_config={"metrics_report_interval_ms": 500},
    )
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": asked})
    options = ServeOptions(model=str(folder), storage=str(tmp_path_factory.mktemp("storage")), limits=LIMITS)
    serve.run(application(options), name="mlmamba")
    yield asked, measured
    serve.shutdown()
    ray.shutdown()


def measured(port, name, **tags):
    """Sum of a measurement's values over all replicas, None where there is none (yet)."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            text = reply.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return None
    values = [
        float(amount)
        for found, inside, amount in re.findall(r"^(\w+)\{(.*?)\} (\S+)$", text, re.MULTILINE)
        if found == f"ray_{name}" and all(f'{key}="{value}"' in inside for key, value in tags.items())
    ]
    return sum(values) if values else None


def test_measurements_are_on_rays_prometheus_endpoint(ports):
    url, port, version = f"http://127.0.0.1:{ports[0]}", ports[1], {"version": "endless"}
    for seed in range(3):
        ask(url, "what is shown?", encoded(seed))
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        made = client.chat.completions.create(
            model="endless", messages=[{"role": "user", "content": "hello"}], max_tokens=5, stream=True
        )
        assert {chunk.system_fingerprint for chunk in made} == {"endless"}
    wait_for(lambda: (measured(port, "mlmamba_completion_tokens_total", **version) or 0) >= 3 * 8 + 5, 60)
    assert measured(port, "mlmamba_completion_tokens_total", **version) == 3 * 8 + 5
    assert measured(port, "mlmamba_requests_total", status="200", application="mlmamba", **version) >= 4
    assert measured(port, "mlmamba_prompt_tokens_total", **version) > 100
    assert measured(port, "mlmamba_model_info", **version) == 1
    for name in ("first_token_seconds", "token_seconds", "queue_seconds"):
        assert measured(port, f"mlmamba_{name}_count", **version) == 4
    assert measured(port, "mlmamba_first_token_seconds_sum", **version) > 0
    wait_for(lambda: measured(port, "mlmamba_slots_in_use", **version) == 0, 60)
    assert measured(port, "mlmamba_waiting_requests", **version) == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_behind_rays_proxy(ports, stream):
    """The answer would take hours."""
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 100_000, "stream": stream}
    connection = http.client.HTTPConnection("127.0.0.1", ports[0], timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    if stream:
        reply = connection.getresponse()
        assert reply.headers["x-model-version"] == "endless"
        assert b"data: " in reply.read(100)
    wait_for(lambda: measured(ports[1], "mlmamba_slots_in_use") == 1, 60)
    connection.sock.shutdown(socket.SHUT_RDWR) if connection.sock else reply.fp.raw._sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_for(lambda: measured(ports[1], "mlmamba_slots_in_use") == 0, 60)


def test_the_request_log_has_no_questions(ports):
    secret = "where-is-the-treasure"
    ask(f"http://127.0.0.1:{ports[0]}", secret)
    logs = ray._private.worker._global_node.get_logs_dir_path()

    def found(text):
        return subprocess.run(["grep", "-rlF", text, logs], capture_output=True, text=True).stdout

    wait_for(lambda: found('"event": "request"'), 30)
    assert found(secret) == ""
