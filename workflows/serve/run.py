"""`mlmamba serve`: Ray Serve on this machine (or on the cluster in RAY_ADDRESS) from one command, until Ctrl-C."""

import contextlib
import errno
import logging
import signal
import socket
import sys
import threading
from pathlib import Path

from workflows.errors import UsageError, WorkflowError
from workflows.registry import PREFIX, ResolvedModel, resolve_model
from workflows.runtime import connect_ray

APPLICATION = "mlmamba"
_MOST_THREADS = 8  # generating one token after the other gains nothing from more


class Server:
    """A running service. Also a context manager that stops it."""

    def __init__(self, url: str, owns_ray: bool):
        self.url = url
        self._owns_ray = owns_ray

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop Ray Serve, after the requests that it is answering, and Ray if it was started for this."""
        _stop(self._owns_ray)


def serve_model(
    reference: str,
    storage: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    replicas: int = 1,
    threads: int | None = None,
    block: bool = True,
) -> Server:
    """Serve a model over HTTP.

    Args:
        reference: models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder.
        storage: the storage folder, for its registry.
        host: address to listen at; 0.0.0.0 for every interface.
        port: port to listen at.
        replicas: copies of the model.
        threads: torch threads of one replica; by default the machine's cores shared out, at most 8.
        block: return only after Ctrl-C (or SIGTERM), with everything stopped; else return as soon as it serves.

    Raises:
        UsageError: the port is taken, or the machine is too small.
        WorkflowError: there is no such model, or it could not be started.
    """
    check_port(host, port)
    source = resolve_model(reference, storage)
    reference = reference if reference.startswith(PREFIX) else str(Path(reference).absolute())
    _say(f"loading {source.label} ...")
    import ray

    owns_ray = not ray.is_initialized()
    connect_ray()
    server = Server(f"http://{_address(host)}:{port}", owns_ray)
    try:
        _refuse_second(ray)
        _deploy(reference, storage, host, port, replicas, threads)
    except BaseException:
        server.stop()
        raise
    _say(_announcement(server.url, source, replicas))
    if block:
        with server:
            _wait_for_interrupt()
            _say("stopping ...")
    return server
