"""`serve deploy` of a config file on a local Ray with its dashboard, as on a cluster: typed options, a change of the
alias that needs no second deployment, and a replica that autoscaling adds, which starts on that version."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import torch
import yaml
from ray import serve

from tests.helpers.processes import free_port
from tests.helpers.serve_client import ServiceError, request
from tests.helpers.serve_load import Clients, post, wait_until_all_serve
from tests.helpers.swap_models import answer_of, register_models, write_model
from workflows.registry import promote
from workflows.serve.start import serve_model
from workflows.tracking.tracker import connect

pytestmark = pytest.mark.slow
QUESTION, TOKENS = "what is shown?", 12


@pytest.fixture
def dashboard():
    """Address of the dashboard of a Ray of this test's own."""
    ray.shutdown()
    port = free_port()
    options = {"dashboard_host": "127.0.0.1", "dashboard_port": port, "log_to_driver": False}
    ray.init("local", num_cpus=2, include_dashboard=True, **options)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def test_a_config_file_is_all_it_takes(dashboard, tmp_path):
    torch.set_num_threads(1)
    storage, work = tmp_path / "storage", tmp_path / "work"
    storage.mkdir()
    work.mkdir()
    folders = {str(n): write_model(tmp_path / str(n), n) for n in (1, 2)}
    client = connect(storage)
    register_models(client, "shapes", list(folders.values()), storage / "packages")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = {
        "model": "models:/shapes@champion",
        "storage": str(storage),
        "autoscaling": {"max_replicas": 2, "requests_per_replica": 1, "upscale_seconds": 1},
        "limits": {"max_batch": 4, "default_tokens": TOKENS},
        "swap": {"poll_seconds": 0.5},
    }
    application = {"name": "mlmamba", "route_prefix": "/", "import_path": "workflows.serve.deployment:application"}
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{**application, "args": options}],
    }
    deploy(work, dashboard, config)
    wait_for_answer(url)
    header, content = post(url, QUESTION, TOKENS)
    assert (header, content["choices"][0]["message"]["content"]) == ("shapes/1", answer_of(folders["1"], QUESTION))
    assert promote(client, "shapes", "2").moved
    wait_until_all_serve(url, "shapes/2", 1)
    assert post(url, QUESTION, TOKENS)[1]["choices"][0]["message"]["content"] == answer_of(folders["2"], QUESTION)
    with Clients(url, 6, [QUESTION], TOKENS) as clients:  # more than one replica should have in hand
        wait_until_all_serve(url, "shapes/2", 2, seconds=300)
    assert clients.failed == []
    assert sorted(file.name for file in work.iterdir()) == ["serve.yaml"]
    assert json.loads((storage / "serving" / "shapes@champion.json").read_text())["version"] == "2"


def test_a_session_stays_with_the_replica_that_has_kept_its_states(tmp_path):
    torch.set_num_threads(1)
    write_model(tmp_path / "model", 1)
    ray.shutdown()
    options = {"replicas": 2, "threads": 1, "routing": "session", "block": False}
    with serve_model(str(tmp_path / "model"), tmp_path, port=free_port(), **options) as server:
        turns = {f"session {number}": [] for number in range(16)}
        cached, processes = [], set()
        for question in ("what is shown?", "where?", "why?"):
            for session, messages in turns.items():
                headers = {"Content-Type": "application/json", "x-session-id": session}
                messages.append({"role": "user", "content": f"{session}: {question}"})
                body = json.dumps({"messages": messages, "max_tokens": TOKENS}).encode()
                call = urllib.request.Request(f"{server.url}/v1/chat/completions", body, headers)
                with urllib.request.urlopen(call, timeout=60) as reply:
                    content = json.load(reply)
                messages.append(content["choices"][0]["message"])
                if question != "what is shown?":
                    cached.append(content["usage"]["prompt_tokens_details"]["cached_tokens"])
                seen = urllib.request.Request(f"{server.url}/v1/swap", None, headers)
                with urllib.request.urlopen(seen, timeout=60) as reply:
                    processes.add((session, json.load(reply)["pid"]))
    assert all(cached)
    assert len(processes) == len(turns)
    assert len({pid for _, pid in processes}) == 2
    ray.shutdown()


def deploy(work: Path, dashboard: str, config: dict) -> None:
    (work / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "deploy", "serve.yaml", "-a", dashboard]
    environment = {**os.environ, "RAY_ADDRESS": ""}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for_answer(url: str) -> None:
    deadline = time.monotonic() + 240
    while True:
        try:
            assert request(url, "/readyz") == {"status": "ready"}
            return
        except (OSError, ServiceError):
            assert time.monotonic() < deadline
            time.sleep(0.5)
