"""What tests of processes and services share: a free port, waiting for a condition, running a command to its end."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable


def free_port() -> int:
    """A loopback port that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(condition: Callable[[], object], seconds: float = 30, pause: float = 0.002) -> None:
    """Return when the condition holds. Raises AssertionError when it does not within so many seconds.

    Args:
        condition: called again and again; what it returns is taken as true or false.
        pause: seconds between two calls.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {seconds:g} s"
        time.sleep(pause)


def finish(process: subprocess.Popen, timeout: float = 300) -> subprocess.CompletedProcess:
    """Wait for a process that leads its own group. After `timeout` seconds the group is killed and TimeoutExpired
    raised."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
