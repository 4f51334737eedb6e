"""The service follows its alias: real Ray Serve with two replicas, a real registry, clients that ask all the time."""

import json
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import free_port
from tests.helpers.serve_client import request
from tests.helpers.swap_models import QUESTION, TOKENS, answer_of, register_models, write_model, write_spoiled
from workflows.registry import promote, rollback
from workflows.serve.start import serve_model
from workflows.serve.swap import SwapOptions
from workflows.tracking.tracker import connect

pytestmark = pytest.mark.usefixtures("two_cpus")
BODY = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": TOKENS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    first = write_model(root / "1", 1)
    return {"1": first, "2": write_model(root / "2", 2), "3": write_spoiled(root / "3", first, "not finite")}


@pytest.fixture(scope="module")
def storage(folders, tmp_path_factory) -> Path:
    storage = tmp_path_factory.mktemp("storage")
    register_models(connect(storage), "shapes", list(folders.values()), storage / "packages")
    return storage


@pytest.fixture(scope="module")
def url(storage):
    swap = SwapOptions(poll_seconds=0.3, retry_seconds=1000)
    options = {"replicas": 2, "threads": 1, "swap": swap, "block": False}
    with serve_model("models:/shapes@champion", storage, port=free_port(), **options) as server:
        yield server.url


def ask(url) -> tuple[str, str, str]:
    """Version in the header, version in the body, answer."""
    call = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(BODY).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=60) as reply:
        content = json.load(reply)
        answer = content["choices"][0]["message"]["content"]
        return reply.headers["x-model-version"], content["system_fingerprint"], answer


def states(url, enough: int = 30) -> list[dict]:
    """What the replicas say of themselves; each is met in so many requests."""
    return [request(url, "/v1/swap") for _ in range(enough)]


def wait_until_all_serve(url, label) -> None:
    deadline = time.monotonic() + 90
    while {state["serving"] for state in states(url)} != {label}:
        assert time.monotonic() < deadline, Counter(state["serving"] for state in states(url))
        time.sleep(0.2)


def test_every_replica_follows_and_no_request_notices(url, storage, folders):
    client, expected = connect(storage), {f"shapes/{v}": answer_of(folders[v]) for v in ("1", "2")}
    assert len(set(expected.values())) == 2
    asked: list[tuple[str, str, str]] = []
    going = True

    def keep_asking():
        while going:
            asked.append(ask(url))

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(keep_asking) for _ in range(4)]
        try:
            for _ in range(2):
                assert promote(client, "shapes", "2").moved
                wait_until_all_serve(url, "shapes/2")
                assert rollback(client, "shapes").version == "1"
                wait_until_all_serve(url, "shapes/1")
        finally:
            going = False
        for done in clients:
            done.result()
    assert {header for header, _, _ in asked} == {"shapes/1", "shapes/2"}
    for header, fingerprint, answer in asked:
        assert (fingerprint, answer) == (header, expected[header])


def test_a_version_that_fails_its_smoke_test_is_refused_and_reported(url, storage, folders):
    client = connect(storage)
    wait_until_all_serve(url, "shapes/1")
    promote(client, "shapes", "3")
    deadline = time.monotonic() + 90
    while any(state["refused"] is None for state in states(url)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for state in states(url):
        assert (state["serving"], state["wanted"], state["refused"]["tries"]) == ("shapes/1", "3", 1)
        assert "not finite" in state["refused"]["reason"]
    assert ask(url)[2] == answer_of(folders["1"])
    assert request(url, "/readyz") == {"status": "ready"}
    record = json.loads(client.get_model_version("shapes", "3").tags["mlmamba.refused"])
    assert "not finite" in record["why"]
    rollback(client, "shapes")
    wait_until_all_serve(url, "shapes/1")
