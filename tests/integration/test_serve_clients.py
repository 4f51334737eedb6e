"""Clients that people have, unchanged, against `mlmamba serve`. OpenAI's own is in test_serve_openai.py.

LangChain and LiteLLM would change versions of the test environment, so each has one of its own, made here. What Open
WebUI sends was written down by hand from what its backend forwards to a server of OpenAI's kind.
"""

import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.helpers.certificates import certificate
from tests.helpers.images import encoded
from tests.helpers.processes import free_port
from tests.helpers.serve_client import ServiceError, data_uri, request
from tests.helpers.serving import load_tiny, raw, running, save_tiny, serve
from workflows.errors import WorkflowError
from workflows.serve.options import Limits
from workflows.serve.start import serve_model

KEY = "one-key"
IMAGE = data_uri(encoded(1))
WEBUI_HEADERS = {
    "Authorization": f"Bearer {KEY}",
    "X-OpenWebUI-User-Name": "Ann",
    "X-OpenWebUI-User-Id": "7f0c",
    "X-OpenWebUI-User-Email": "ann@example.com",
    "X-OpenWebUI-User-Role": "user",
    "X-OpenWebUI-Chat-Id": "51b9",
}
WEBUI = {
    "a chat with an image": {
        "stream": True,
        "model": "shapes",
        "messages": [
            {"role": "system", "content": "You are brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what is shown?"},
                    {"type": "image_url", "image_url": {"url": IMAGE}},
                ],
            },
        ],
        "stream_options": {"include_usage": True},
    },
    "a later turn with parameters": {
        "stream": True,
        "model": "shapes",
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "again?"},
        ],
        "temperature": 0.8,
        "top_p": 0.9,
        "max_tokens": 20,
        "seed": 4,
        "stop": ["\n\n"],
        "frequency_penalty": 0,
        "presence_penalty": 0,
    },
    "a title for the chat": {
        "model": "shapes",
        "messages": [{"role": "user", "content": '### Task:\nGenerate a title.\n### Output:\nJSON: { "title": "x" }'}],
        "stream": False,
        "max_completion_tokens": 30,
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    service = serve(load_tiny(tmp_path_factory.mktemp("clients") / "tiny"), Limits(max_tokens=64, default_tokens=8))
    with running(service) as url:
        yield url
    service.served.engine.close()


@pytest.mark.parametrize("body", WEBUI.values(), ids=WEBUI)
def test_what_open_webui_sends(tiny, body):
    assert raw(tiny, "/v1/models", headers=WEBUI_HEADERS)[2]["data"][0]["id"] == "shapes"
    if not body["stream"]:
        status, _, answer = raw(tiny, "/v1/chat/completions", body, headers=WEBUI_HEADERS)
        assert (status, answer["choices"][0]["message"]["role"]) == (200, "assistant")
        return
    call = urllib.request.Request(
        tiny + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", **WEBUI_HEADERS},
    )
    with urllib.request.urlopen(call, timeout=60) as reply:
        events = [line[6:] for line in reply.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert len(ends) == 1
    assert bool(chunks[-1].get("usage")) == ("stream_options" in body)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`mlmamba serve` of a tiny model, by the name shapes, with a key."""
    folder = save_tiny(tmp_path_factory.mktemp("served") / "tiny")
    port = free_port()
    options = ["--port", str(port), "--served-model-name", "shapes", "--storage", str(folder.parent / "storage")]
    command = [sys.executable, "-m", "workflows.cli", "serve", str(folder), *options]
    with subprocess.Popen(command, env={**os.environ, "MLMAMBA_API_KEYS": KEY}) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(240):
                try:
                    request(url, "/readyz")
                    break
                except (OSError, ServiceError):  # Ray Serve answers 404 before it knows the route
                    assert process.poll() is None, "mlmamba serve has ended"
                    time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "script", "said"),
    [
        (
            "langchain-openai",
            "client_langchain",
            ["json_schema {", "json_mode {", "function_calling OpenAIInvalidRequestError"],
        ),
        (
            "litellm",
            "client_litellm",
            ["json_schema {", "max_tokens BadRequestError", "tools BadRequestError", "key Auth"],
        ),
    ],
)
def test_a_client_of_its_own_environment(served, package, script, said, tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    made = subprocess.run([python, "-m", "pip", "install", "-q", package], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"{package} cannot be installed here: {made.stderr.strip().splitlines()[-1][:200]}")
    file = os.path.join(os.path.dirname(__file__), "..", "helpers", f"{script}.py")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for a list of prices in the network
    done = subprocess.run([python, file, served, KEY, IMAGE], capture_output=True, text=True, env=clean, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in said:
        assert line in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_https_by_other_names_under_a_path(tmp_path):
    """A service of its own: Ray Serve has one proxy, which speaks HTTP or HTTPS."""
    folder = save_tiny(tmp_path / "tiny")
    key, made = certificate(tmp_path)
    options = {"served_names": ("gpt-shapes",), "root_path": "/llm", "certificate": (str(key), str(made))}
    with serve_model(str(folder), tmp_path, port=free_port(), threads=1, block=False, **options) as server:
        trusting = ssl.create_default_context(cafile=str(made))
        base = server.url.replace("127.0.0.1", "localhost") + "/llm"
        assert base.startswith("https://")
        with urllib.request.urlopen(base + "/v1/models", context=trusting) as reply:
            assert json.load(reply)["data"][0]["id"] == "gpt-shapes"
        with urllib.request.urlopen(base + "/metrics", context=trusting) as reply:
            assert b"mlmamba_requests_total" in reply.read()


@pytest.mark.slow
def test_a_proxy_that_does_not_start_in_time_is_one_line(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "tiny")
    monkeypatch.setattr("ray.serve._private.api.HTTP_PROXY_TIMEOUT", 0.0)
    with pytest.raises(WorkflowError, match="Ray Serve did not start in time"):
        serve_model(str(folder), tmp_path, port=free_port(), threads=1, block=False)
