"""`mlmamba serve`: Ray Serve on this machine (or on the cluster in RAY_ADDRESS) from one command, until Ctrl-C."""

import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from pathlib import Path

from workflows.errors import UsageError, WorkflowError
from workflows.registry import PREFIX, ResolvedModel, resolve_model
from workflows.runtime import connect_ray
from workflows.serve.auth import KEYS_VARIABLE, Access
from workflows.serve.options import Limits
from workflows.serve.proxy import CALLBACK, MOST_VARIABLE, VARIABLE, requests_at_once
from workflows.serve.swap import SwapOptions
from workflows.tracking import tracker as tracking

APPLICATION = "mlmamba"
_MOST_THREADS = 8  # generating one token after the other gains nothing from more


class Server:
    """A running service. Also a context manager that stops it."""

    def __init__(self, url: str, joined: bool):
        self.url = url
        self._joined = joined  # whether this process came to Ray for the service alone

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop Ray Serve, after the requests that it is answering, and Ray if it was started for this."""
        import ray
        from ray import serve
        from ray.serve.exceptions import RayServeException

        with contextlib.suppress(RayServeException):  # Ray Serve did not come up
            serve.delete(APPLICATION)
        started = self._joined and os.environ.get("RAY_ADDRESS", "") in ("", "local")
        if not started:
            serve.shutdown()  # else it goes with its Ray; doing both makes Ray print a false alarm
        if self._joined:
            ray.shutdown()


def serve_model(
    reference: str,
    storage: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    replicas: int = 1,
    max_replicas: int | None = None,
    threads: int | None = None,
    gpus: float | None = None,
    access: Access | None = None,
    no_api_keys: bool = False,
    swap: SwapOptions | None = None,
    limits: Limits | None = None,
    precision: str = "auto",
    exact: bool = False,
    routing: str = "load",
    served_names: tuple[str, ...] = (),
    root_path: str = "",
    certificate: tuple[str, str] | None = None,
    block: bool = True,
) -> Server:
    """Serve a model over HTTP.

    Args:
        reference: models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder.
        storage: the storage folder, for its registry.
        host: address to listen at; 0.0.0.0 for every interface.
        port: port to listen at.
        replicas: copies of the model.
        max_replicas: most copies, when there is more to do.
        threads: torch threads of one replica; by default the machine's cores shared out, at most 8.
        gpus: GPU of one replica; by default one each where there are as many.
        access: who may ask.
        no_api_keys: let everyone ask who reaches an address other than this machine's own.
        swap: how an alias is followed.
        limits: of one replica.
        precision, exact: how the model computes, as `load_model` takes them.
        routing: which replica answers, as in `ServeOptions`.
        served_names: names under which clients ask for the model, in place of the registered one.
        root_path: path under which a proxy offers the service.
        certificate: files of a private key and of its certificate: serve https.
        block: return only after Ctrl-C (or SIGTERM), with everything stopped; else return as soon as it serves.

    Raises:
        UsageError: the port is taken, the machine is too small, or API keys are missing.
        WorkflowError: there is no such model, or it could not be started.
    """
    check_port(host, port)
    access = access or Access()
    need_keys = check_keys(host, access, not no_api_keys and not _only_here(host))
    if _only_here(host) and not need_keys and not access.hosts:
        access = access.model_copy(update={"hosts": tuple({"localhost", "127.0.0.1", "::1", host})})
    source = resolve_model(reference, storage)
    reference = reference if reference.startswith(PREFIX) else str(source.folder.absolute())
    _say(f"loading {source.label} ...")
    import ray

    joined = not ray.is_initialized()
    _prepare_proxy(limits or Limits(), max(replicas, max_replicas or 0))
    connect_ray()
    if joined and os.environ.get("RAY_ADDRESS", "") in ("", "local") and os.environ.get("RAY_AUTH_MODE") != "token":
        _say("note: Ray runs without its token check, and its ports listen on every interface; set RAY_AUTH_MODE=token")
    server = Server(f"{'https' if certificate else 'http'}://{_address(host)}:{port}", joined)
    try:
        options = _options(ray.cluster_resources(), reference, storage, replicas, max_replicas, threads, gpus)
        options = options.model_copy(
            update={
                "access": access,
                "require_keys": need_keys,
                "swap": swap or SwapOptions(),
                "limits": limits or Limits(),
                "precision": precision,
                "exact": exact,
                "routing": routing,
                "served_names": served_names,
                "root_path": root_path,
            }
        )
        _refuse_second(ray)
    except BaseException:
        if joined:
            ray.shutdown()
        raise
    try:
        _deploy(options, host, port, certificate)
    except BaseException:
        server.stop()
        raise
    _say(_announcement(server.url, source, replicas))
    if block:
        with server:
            _wait_for_interrupt()
            _say("stopping ...")
    return server


def _prepare_proxy(limits: Limits, replicas: int) -> None:
    """Have the proxy of a Ray that starts from here refuse what one client sends beyond what all replicas can hold."""
    os.environ.setdefault(VARIABLE, CALLBACK)
    os.environ.setdefault(MOST_VARIABLE, str((limits.max_batch + limits.max_waiting) * replicas))
    try:
        requests_at_once(dict(os.environ))
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_port(host: str, port: int) -> None:
    """Raise UsageError unless the port can be listened at."""
    if not 0 < port < 65536:
        raise UsageError(f"--port {port}: ports go from 1 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left counts as free
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"--port {port}: {host}:{port} is in use; stop what listens there or choose another --port"
        elif error.errno == errno.EACCES:
            message = f"--port {port}: not allowed to listen at {host}:{port}; choose a --port from 1024 on"
        else:
            message = f"--host {host}: cannot listen at {host}:{port} ({error.strerror}); choose another --host"
        raise UsageError(message) from error


def check_keys(host: str, access: Access, needed: bool) -> bool:
    """Whether the service must ask for API keys: where they are needed, and where there are some, as who gives keys
    means them. A replica that finds none then does not start (on a cluster it looks in its own environment).

    Raises:
        UsageError: the keys cannot be read, or are needed and missing.
    """
    try:
        keys = access.keys(dict(os.environ))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if "*" in access.origins and not keys:
        raise UsageError(f"--origins '*' lets every web page ask, so API keys are needed: set {KEYS_VARIABLE}")
    if needed and not keys:
        raise UsageError(
            f"--host {host}: others can reach that address, so API keys are needed: set {KEYS_VARIABLE} (separated by "
            "commas) or give --api-keys-file FILE (one a line). --no-api-keys lets everyone ask"
        )
    return bool(keys)


def _only_here(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_second(ray) -> None:
    # Not serve.status(): it fails in a process that has used Ray Serve on a Ray that is gone.
    actors = ray.util.list_named_actors(all_namespaces=True)
    if any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in actors):
        raise WorkflowError(
            f"Ray Serve already runs on this Ray cluster ({ray.get_runtime_context().gcs_address}); "
            "stop it with `serve shutdown`, or add the model to its config (workflows.serve.deployment:application)"
        )


def _options(
    have: dict[str, float],
    reference: str,
    storage: Path,
    replicas: int,
    max_replicas: int | None,
    threads: int | None,
    gpus: float | None,
):
    from workflows.serve.deployment import Autoscaling, ServeOptions

    cores = int(have.get("CPU", 0))
    if not 0 < replicas * (threads or 1) <= cores:
        raise UsageError(
            f"--replicas {replicas}: with {threads or 1} CPU cores each; Ray has {cores} here, so choose from 1 to "
            f"{cores // (threads or 1)}"
        )
    if max_replicas is not None and max_replicas < replicas:
        raise UsageError(f"--max-replicas {max_replicas}: must be at least --replicas {replicas}")
    if gpus is not None and not (0 <= gpus <= 1 and gpus * replicas <= have.get("GPU", 0)):
        raise UsageError(
            f"--gpus {gpus:g}: from 0 to 1 for each of {replicas} replicas; Ray has {have.get('GPU', 0):g} GPUs here"
        )
    most = max(replicas, max_replicas or 0)
    return ServeOptions(
        model=reference,
        storage=str(storage),
        registry=tracking.SERVER,
        replicas=replicas,
        autoscaling=Autoscaling(max_replicas=max_replicas) if max_replicas and max_replicas > replicas else None,
        threads=threads or max(1, min(_MOST_THREADS, cores // most)),
        gpus=float(have.get("GPU", 0) >= most) if gpus is None else gpus,
    )


def check_certificate(key: str | None, certificate: str | None) -> tuple[str, str] | None:
    """Files of a private key and its certificate, None where neither is given. Raises UsageError."""
    if (key is None) != (certificate is None):
        raise UsageError("--ssl-keyfile and --ssl-certfile: give both, or neither")
    if key is None:
        return None
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, lambda: "")
    except OSError as error:  # ssl.SSLError is one; an empty password, else OpenSSL would ask for one
        raise UsageError(f"--ssl-certfile {certificate}, --ssl-keyfile {key}: cannot be used ({error})") from error
    return str(Path(key).absolute()), str(Path(certificate).absolute())


def _deploy(options, host: str, port: int, certificate: tuple[str, str] | None) -> None:
    from ray import serve

    from workflows.serve.deployment import application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        http = {"host": host, "port": port}
        if certificate is not None:
            http |= dict(zip(("ssl_keyfile", "ssl_certfile"), certificate, strict=True))
        serve.start(proxy_location="HeadOnly", http_options=http)
        serve.run(application(options), name=APPLICATION)
    except TimeoutError as error:  # of Ray Serve's proxy, which has 60 s to start
        logs = "/tmp/ray/session_latest/logs/serve"
        message = f"Ray Serve did not start in time ({error}); the machine may be too busy: try again, or see {logs}"
        raise WorkflowError(message) from error
    except RuntimeError as error:
        raise WorkflowError(f"{options.model} could not be served: {_cause(serve.status())}") from error


def _cause(status) -> str:
    """The last line of the replica's traceback, which Ray Serve keeps in the deployment's message."""
    deployments = [d for application in status.applications.values() for d in application.deployments.values()]
    lines = [line.strip() for d in deployments for line in d.message.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray Serve gives no reason; see its logs in /tmp/ray/session_latest/logs/serve"


def _wait_for_interrupt() -> None:
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    # Both: a shell that starts a command in the background lets it ignore SIGINT.
    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _address(host: str) -> str:
    """How to write the host in a URL that works on this machine."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host


def _announcement(url: str, source: ResolvedModel, replicas: int) -> str:
    run = f", run {source.run_id}" if source.run_id else ""
    return f"""
serving   {source.label}{run}{f", {replicas} replicas" if replicas > 1 else ""}
at        {url}/v1 (OpenAI style; Ctrl-C stops)
ask       curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d @- <<END
{{"messages": [{{"role": "user", "content": [
  {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,$(base64 < image.png | tr -d '\\n')"}}}},
  {{"type": "text", "text": "what is shown?"}}]}}]}}
END
"""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
