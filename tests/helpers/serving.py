"""What tests of the service share: a tiny model, and the HTTP interface in front of it on a free loopback port."""

import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn

from mlmamba.loading import load_model
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from workflows.registry import ResolvedModel
from workflows.serve.engine import Engine
from workflows.serve.http import build_app
from workflows.serve.service import Served, Service
from workflows.train.initial import save


def save_tiny(folder: Path) -> Path:
    """A model folder. The model's answers are noise that depends on every word and image."""
    save(tiny_model({"tie_word_embeddings": False}, max_position_embeddings=300), tiny_tokenizer(), folder)
    return folder


def load_tiny(folder: Path):
    """Model and processor of `save_tiny`."""
    torch.set_num_threads(1)
    return load_model(save_tiny(folder))


def serve(loaded, limits, access=None, version="3", threads=1) -> Service:
    """A service with a loaded model, as version `version` of `shapes`. Close its engine in the end."""
    service = Service(limits, access)
    service.served = Served(Engine(*loaded, limits, threads), resolved(version))
    return service


def resolved(version: str) -> ResolvedModel:
    """Where the model is said to come from."""
    return ResolvedModel(Path("somewhere"), "shapes", version, "run0123")


@contextmanager
def running(service: Service, root_path: str = "", application=None, **options):
    """URL of the application, under uvicorn. With a root path it is asked for below it, as Ray Serve's route_prefix.

    Args:
        service: what answers.
        root_path: of uvicorn.
        application: in place of `build_app(service)`.
        options: further ones of uvicorn.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(
            uvicorn.Config(
                application or build_app(service), log_level="critical", ws="none", root_path=root_path, **options
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def raw(url, path, body=None, method=None, headers=None):
    """Status, headers and JSON of a response, whatever its status."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    call = urllib.request.Request(
        url + path, data, {"Content-Type": "application/json", **(headers or {})}, method=method
    )
    try:
        with urllib.request.urlopen(call, timeout=60) as reply:
            return reply.status, reply.headers, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)
