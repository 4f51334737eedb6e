"""A Ray cluster of processes on this machine: a head with a dashboard and some workers, each with its own ports.

Every node is a `ray start --block` in a session of its own. The cluster wants a token, which Ray will soon by default.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import requests

from tests.helpers.processes import finish, free_port

_RAY = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
_STORE = 100 << 20  # bytes of a node's object store
_START = 240  # seconds, on a busy machine


class RayCluster:
    """Starts in `__enter__`; `address` is the dashboard's, `nodes` are the workers' processes."""

    def __init__(self, workers: int = 2, cpus: int = 1):
        self._workers, self._cpus = workers, cpus
        self.nodes: list[subprocess.Popen] = []
        self._added = 0

    def __enter__(self) -> "RayCluster":
        for last in (False, False, True):  # Ray gives a node 30 s to start, which a busy machine may exceed
            try:
                return self._start_all()
            except BaseException as error:
                self.__exit__()
                if last or not isinstance(error, AssertionError | TimeoutError):
                    raise
        raise AssertionError

    def _start_all(self) -> "RayCluster":
        self.nodes = []
        self.folder = Path(tempfile.mkdtemp(prefix="rc"))  # short: sockets lie in it
        port, dashboard, client = (free_port() for _ in range(3))
        self.token = secrets.token_hex(16)
        self.headers = {"Authorization": f"Bearer {self.token}"}
        self.gcs, self.address = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        # No CPU of its own: everything that takes one runs on the workers.
        self.head = self._start("--head", *ports, "--include-dashboard=true", "--num-cpus=0", name="head")
        self.wait_for(1)
        for number in range(self._workers):  # one after the other: each start takes a core for seconds
            self.add_surely(number + 2)
        return self

    def add_surely(self, nodes: int) -> None:
        """Add a worker, again if it does not come up: Ray gives up on a node that a busy machine starts too slowly."""
        for _ in range(4):
            node = self.add()
            try:
                return self.wait_for(nodes, 90)
            except (AssertionError, TimeoutError):
                self.kill(node)
        raise TimeoutError(f"no worker came up in four attempts\n{self._logs()}")

    def __exit__(self, *error) -> None:
        for process in (*self.nodes, self.head):
            kill_tree(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, hidden: Path | None = None) -> subprocess.Popen:
        """One more worker, which sees an empty folder of its own in place of `hidden`; needs the right to mount."""
        self._added += 1
        apart = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(hidden)]
        options = (f"--address={self.gcs}", f"--num-cpus={self._cpus}")
        self.nodes.append(self._start(*options, name=f"w{self._added}", prefix=apart if hidden else []))
        return self.nodes[-1]

    def wait_for(self, nodes: int, seconds: float = _START) -> None:
        """Wait until so many nodes are alive, the head among them."""
        self._wait(lambda: self.alive() == nodes, seconds)

    def kill(self, node: subprocess.Popen) -> None:
        """SIGKILL for a node and all its processes."""
        self.nodes.remove(node)
        kill_tree(node)

    def alive(self) -> int:
        """Nodes that the cluster counts as alive."""
        answer = self.get("/nodes?view=summary").json()
        return sum(node["raylet"].get("state") == "ALIVE" for node in answer["data"]["summary"])

    def get(self, path: str) -> requests.Response:
        """Ask the dashboard."""
        return requests.get(self.address + path, timeout=10, headers=self.headers)

    def submit(self, *arguments: str | Path) -> subprocess.Popen:
        """`mlmamba submit` with this cluster's address and token, as a process group of its own."""
        command = [sys.executable, "-m", "workflows.cli", "submit", *map(str, arguments), "--address", self.address]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment | {"RAY_AUTH_TOKEN": self.token},
            preexec_fn=listen_to_interrupts,
        )

    def submitted(self, *arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess:
        """`mlmamba submit` to its end."""
        process = self.submit(*arguments)
        return finish(process, timeout)

    def workers_of(self, node: subprocess.Popen, title: str) -> list[psutil.Process]:
        """A node's Ray workers whose process title contains a text."""
        found = []
        for child in psutil.Process(node.pid).children(recursive=True):
            try:
                if title in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def _start(self, *options: str, name: str, prefix: list[str] | None = None) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        temporary = self.folder / name
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [
                    *(prefix or []),
                    *_RAY,
                    "--node-ip-address=127.0.0.1",
                    f"--object-store-memory={_STORE}",
                    f"--temp-dir={temporary}",
                    "--dashboard-agent-listen-port=0",
                    *options,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def _wait(self, ready, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for process in (self.head, *self.nodes):
                assert process.poll() is None, self._logs()
            try:
                if ready():
                    return
            except (requests.exceptions.RequestException, KeyError, ValueError):
                pass
            time.sleep(0.3)
        raise TimeoutError(f"the cluster did not start within {seconds} s\n{self._logs()}")

    def _logs(self) -> str:
        return "\n".join(f"{file.name}: {file.read_text()[-5000:]}" for file in sorted(self.folder.glob("*.log")))


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL for all processes of the session that a process began, which are its own whatever became of it."""
    for pid in (process.pid, *psutil.pids()):
        with suppress(ProcessLookupError):
            if pid == process.pid or os.getsid(pid) == process.pid:
                os.kill(pid, signal.SIGKILL)
    process.wait()


def listen_to_interrupts() -> None:
    """Ctrl-C counts also where these tests themselves run in the background of a shell, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def lines_until(process: subprocess.Popen, word: str) -> list[str]:
    """What a client shows, up to the first line with a word."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError(f"{word!r} never came:\n{''.join(lines)}")
