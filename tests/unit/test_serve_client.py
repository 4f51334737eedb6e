"""The patient client against a real HTTP server that is not always well."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.helpers.serve_client import ServiceError, ask_again, request_again


@pytest.fixture
def service():
    """Its URL, and the list of what the next requests get: a status, or "hang up"; 200 when it is empty."""
    planned, seen = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            status = planned.pop(0) if planned else 200
            if status == "hang up":
                self.connection.close()
                return
            body = json.dumps({"error": {"message": "no", "code": "c"}} if status != 200 else {"fine": True}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", planned, seen
    server.shutdown()
    server.server_close()
    thread.join()


def test_it_asks_again_until_the_service_is_back(service):
    url, planned, seen = service
    planned += [503, "hang up", 500, 429]
    assert request_again(url, "/a", patience=30) == {"fine": True}
    assert len(seen) == 5


@pytest.mark.parametrize("status", [400, 401, 404, 413, 504])
def test_an_error_that_stays_is_raised_at_once(service, status):
    url, planned, seen = service
    planned.append(status)
    with pytest.raises(ServiceError) as error:
        request_again(url, "/a", patience=30)
    assert (error.value.status, len(seen)) == (status, 1)


def test_patience_ends_and_every_retry_is_told(service):
    url, planned, seen = service
    planned += [503] * 50
    with pytest.raises(ServiceError):
        request_again(url, "/a", patience=0.5)
    assert 1 < len(seen) < 10
    told = []
    planned[:] = [503, 503]
    ask_again(lambda: request_again(url, "/a", patience=0), 30, told.append)
    assert [error.status for error in told] == [503, 503]


def test_a_service_that_is_not_there_is_an_os_error():
    with pytest.raises(OSError, match="refused"):
        request_again("http://127.0.0.1:9", "/a", patience=0.3)
