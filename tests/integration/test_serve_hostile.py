"""Seventy hostile requests: never a server error, and the good requests beside them are answered as if alone.

tests/benchmarks/drills/serve_hostile.py sends as many as one likes.
"""

import json

import pytest

from tests.benchmarks.drills.serve_hostile import attack, failures
from tests.helpers.hostile import post, question, send
from tests.helpers.images import encoded
from tests.helpers.processes import wait_for
from tests.helpers.serve_client import data_uri
from tests.helpers.serving import load_tiny, raw, running, serve
from workflows.serve.options import Limits

LIMITS = Limits(
    max_batch=4, max_waiting=32, body_bytes=2 * 2**20, image_bytes=10**6, image_pixels=10**7, body_seconds=0.5
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("hostile") / "tiny")


def test_hostile_requests_beside_good_ones(loaded):
    service = serve(loaded, LIMITS)
    with running(service) as url:
        counts, good = attack(url, range(70), clients=8, pause=0.8)
        wait_for(lambda: service.served.engine.load == (0, 0))
    assert not failures(counts)
    assert sum(counts.values()) == 70
    assert good.asked > 3
    assert good.wrong == []
    assert {status for _, status in counts} >= {200, 400, 408, 413}
    service.served.engine.close()


def test_the_bodies_held_at_once_are_bounded(loaded):
    """Four clients send half of a large body each and stop: there is room for two, and the first give way."""
    limits = LIMITS.model_copy(update={"held_bytes": 1_000_000, "body_seconds": 30})
    service = serve(loaded, limits)
    import socket

    with running(service) as url:
        port = int(url.rpartition(":")[2])
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        head += b"Content-Length: 1500000\r\n\r\n"
        held = []
        for _ in range(4):
            connection = socket.create_connection(("127.0.0.1", port), timeout=30)
            connection.sendall(head + b"x" * 400_000)
            held.append(connection)
        assert [_status(connection) for connection in held] == [408, 408, None, None]
        for connection in held:
            connection.close()
        small = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        wait_for(lambda: raw(url, "/v1/chat/completions", small)[0] == 200)
        large = json.dumps(question([{"type": "image_url", "image_url": {"url": data_uri(b"x" * 600_000)}}])).encode()
        for _ in range(4):  # what was held is free again, whatever became of the requests
            assert raw(url, "/v1/chat/completions", large)[0] == 400
        assert send("127.0.0.1", port, _as_hostile(post(large[:-1]))) == 400
    service.served.engine.close()


def _status(connection) -> int | None:
    connection.settimeout(1)
    try:
        return int(connection.recv(100).split(b" ")[1])
    except TimeoutError:
        return None


def _as_hostile(data: bytes):
    from tests.helpers.hostile import Hostile

    return Hostile("one", ((data, 0.0),))


def test_large_images_are_decoded_one_at_a_time(loaded, monkeypatch):
    """Sixteen images of nine million pixels: never two of them decoded in one request at once."""
    import workflows.serve.messages as messages

    alive, most = set(), [0]
    original = messages.open_image

    def counted(*args):
        image = original(*args)
        alive.add(id(image))
        most[0] = max(most[0], len(alive))
        import weakref

        weakref.finalize(image, alive.discard, id(image))
        return image

    monkeypatch.setattr(messages, "open_image", counted)
    service = serve(loaded, LIMITS)
    part = {"type": "image_url", "image_url": {"url": data_uri(encoded(1, size=(1000, 1000)))}}
    with running(service) as url:
        status, _, content = raw(url, "/v1/chat/completions", question([part] * 16))
    assert (status, content["usage"]["prompt_tokens"] > 64) == (200, True)
    assert most[0] <= 2
    service.served.engine.close()
