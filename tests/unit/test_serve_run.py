"""Starting and stopping from the command line: what can be checked without starting Ray."""

import os
import signal
import socket
import threading

import pytest

from workflows.errors import UsageError
from workflows.serve.run import _address, _wait_for_interrupt, check_port


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_and_handlers_are_put_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    timer = threading.Timer(0.2, os.kill, (os.getpid(), number))
    timer.start()
    _wait_for_interrupt()
    timer.join()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_port_in_use_names_the_flag():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: 127.0.0.1:{port} is in use; .* another --port"):
            check_port("127.0.0.1", port)
        with pytest.raises(UsageError, match="in use"):
            check_port("0.0.0.0", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "flag"), [("127.0.0.1", 70_000, "--port 70000"), ("192.0.2.77", 80, "--host")]
)
def test_where_one_cannot_listen(host, port, flag):
    with pytest.raises(UsageError, match=flag):
        check_port(host, port)


def test_hosts_in_urls():
    assert [_address(host) for host in ("0.0.0.0", "::", "::1", "here")] == ["127.0.0.1", "[::1]", "[::1]", "here"]
