"""A real server that speaks S3, on this machine, for the time of some tests.

    @pytest.fixture(scope="module")
    def s3():
        with running_s3() as server:
            yield server

Start it before Ray: workers take the keys from the environment that Ray is started in.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from tests.helpers.processes import free_port

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
_SECONDS_TO_START = 30


@dataclass(frozen=True)
class S3:
    """A running server with one bucket."""

    address: str
    """host:port"""
    bucket: str = "bucket"

    @property
    def endpoint(self) -> str:
        """URL of the server."""
        return f"http://{self.address}"

    def uri(self, path: str = "") -> str:
        """URI of a file or folder in the bucket, with all that is needed to reach it."""
        return f"s3://{self.bucket}/{path}?region=us-east-1&scheme=http&endpoint_override={self.address}"

    def upload(self, local: Path, path: str) -> str:
        """Copy a file or a folder into the bucket. Returns its URI."""
        store, root = fs.FileSystem.from_uri(self.uri(path))
        files = [file for file in local.rglob("*") if file.is_file()] if local.is_dir() else [local]
        for file in files:
            inside = "" if local.is_file() else f"/{file.relative_to(local).as_posix()}"
            with store.open_output_stream(f"{root}{inside}") as sink:
                sink.write(file.read_bytes())
        return self.uri(path)

    def names(self, path: str = "") -> list[str]:
        """Every object below a folder, relative to the bucket."""
        store, root = fs.FileSystem.from_uri(self.uri(path))
        infos = store.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        files = [info.path.partition("/")[2] for info in infos if info.type == fs.FileType.File]
        return sorted(file for file in files if not file.endswith("/"))


@contextmanager
def running_s3() -> Iterator[S3]:
    """Start moto's server on a free port of this machine, with the keys in the environment; stop it at the end."""
    port = free_port()
    before = {name: os.environ.get(name) for name in KEYS}
    os.environ.update(KEYS)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = S3(f"127.0.0.1:{port}")
    try:
        _wait(process, f"{server.endpoint}/moto-api/")
        urllib.request.urlopen(urllib.request.Request(f"{server.endpoint}/{server.bucket}", method="PUT"), timeout=10)
        yield server
    finally:
        process.terminate()
        process.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass
class Traffic:
    """What came out of a server through `counted`."""

    bytes: int = 0
    requests: int = 0


@contextmanager
def counted(server: S3) -> Iterator[tuple[S3, Traffic]]:
    """The same server at another address, where bytes that it sends are counted, and the pieces that it is sent."""
    traffic, lock = Traffic(), threading.Lock()
    host, port = server.address.split(":")

    def pass_on(source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                with lock:
                    traffic.bytes += len(data) if answers else 0
                    traffic.requests += not answers
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            behind = socket.create_connection((host, int(port)))
            for ends in ((client, behind, False), (behind, client, True)):
                threading.Thread(target=pass_on, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield S3(f"127.0.0.1:{listener.getsockname()[1]}", server.bucket), traffic
        listener.shutdown(socket.SHUT_RDWR)


def _wait(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while True:
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"moto_server did not start on {url}; pip install 'moto[server]'") from error
            time.sleep(0.05)
