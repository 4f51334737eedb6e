"""The Ray Serve deployment: one replica is one process with one model and its engine.

`application` builds it from typed options, for `mlmamba serve` and for a Serve config file alike
(`import_path: workflows.serve.deployment:application`, the options under `args`; cluster/serve/serve.yaml is one).
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from pipelines.config import StrictModel
from workflows.serve.auth import Access
from workflows.serve.options import ROOT_PATH, Limits
from workflows.serve.swap import SwapOptions

_BY_SESSION = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_ALWAYS_ROOM = 2048
"""Calls beyond batch, queue and arriving bodies that reach the replica: health checks, refusals, and bodies that are
given up as soon as newer ones arrive. A call that finds no room waits in Ray Serve's router, which looks for some ever
less often: with room for 32, five hundred half-sent bodies kept a health check waiting for 20 s."""


class Autoscaling(StrictModel):
    """Replicas that come and go with the load. A new one starts on the version that the alias names then."""

    max_replicas: int = Field(gt=0)
    """Most replicas; `replicas` is the least."""
    requests_per_replica: float = Field(8, gt=0)
    """Requests in hand, waiting ones included, that one replica should have on average."""
    upscale_seconds: float = Field(15, ge=0)
    """How long there must be more before replicas are added."""
    downscale_seconds: float = Field(300, ge=0)
    """How long there must be fewer before replicas are taken away; they finish what they began."""


class ServeOptions(StrictModel):
    """What to serve and with what."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder. An alias is followed: when it moves, so does every
    replica, without a pause."""
    storage: str
    """The storage folder, for its registry; every node that runs a replica sees it."""
    registry: str | None = None
    """MLflow tracking URI. Absent: MLFLOW_TRACKING_URI where the replica runs, or the database in the storage folder.
    Name and password of a server belong in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    served_names: tuple[str, ...] = ()
    """Names under which clients ask for the model, in place of the registered one; answers give the first."""
    root_path: str = Field("", pattern=f"^{ROOT_PATH}$")
    """Path under which a proxy offers the service, such as /llm. Requests may come with it or without."""
    replicas: int = Field(1, gt=0)
    """Processes, each with its own copy of the model."""
    autoscaling: Autoscaling | None = None
    """More processes when there is more to do."""
    routing: Literal["load", "session"] = "load"
    """Which replica answers: the one of two with less to do; or `session`, for requests with the same header
    `x-session-id` the same one, which has kept their states (others are spread evenly, whatever each has to do)."""
    threads: int = Field(1, gt=0)
    """CPU cores, and torch threads, of one replica."""
    gpus: float = Field(0, ge=0, le=1)
    """GPU of one replica; 0.5 puts two on one. While a new version is loaded, a replica holds two models."""
    precision: Literal["auto", "bf16", "fp32", "int8"] = "auto"
    """What the model computes in: bf16, fp32 or, on a CPU, int8; `auto` is bf16 on a GPU that has it."""
    exact: bool = False
    """Answers have the same bits whatever shares their batch, in whatever pieces prompts are read, and with kept states
    or without: a pure Mamba-2 model on a CPU with a C++ compiler. Elsewhere the log and `computes_in` of /v1/models
    say why they do not."""
    limits: Limits = Limits()
    """Limits of one replica."""
    access: Access = Access()
    """Who may ask, and which images may be fetched."""
    require_keys: bool = False
    """Do not start without API keys: set where others than this machine can reach the service."""
    swap: SwapOptions = SwapOptions()
    """How the alias is followed."""

    @model_validator(mode="after")
    def _least_and_most(self):
        if self.autoscaling and self.autoscaling.max_replicas < self.replicas:
            raise ValueError(
                f"autoscaling.max_replicas = {self.autoscaling.max_replicas} is under replicas = {self.replicas}"
            )
        return self


@serve.deployment(name="mlmamba", max_constructor_retry_count=2)
@serve.ingress()
class ModelDeployment:
    """Loads the model before it counts as running, so Ray Serve sends requests only to replicas that can answer."""

    def __init__(self, options: dict):
        chosen = ServeOptions.model_validate(options)
        if chosen.registry:
            os.environ["MLFLOW_TRACKING_URI"] = chosen.registry  # before workflows.tracking.tracker reads it
        from workflows.runtime import quiet_libraries

        quiet_libraries()
        from workflows.serve.alias import Follower
        from workflows.serve.service import Service

        self._service = Service(chosen.limits, chosen.access, chosen.served_names)
        self._root_path = chosen.root_path
        if chosen.require_keys and not self._service.gate.has_keys:
            raise ValueError(
                "no API keys where the replica runs: set MLMAMBA_API_KEYS there or give access.api_keys_file"
            )
        self._follower = Follower(
            chosen.model,
            Path(chosen.storage),
            self._service,
            chosen.swap,
            chosen.limits,
            chosen.threads,
            serve.get_replica_context().replica_id.unique_id,
            chosen.precision,
            chosen.exact,
        )

    def __serve_build_asgi_app__(self):
        """The HTTP interface; Ray Serve calls this after the constructor."""
        from workflows.serve.http import build_app
        from workflows.serve.webhook import add_routes

        app = build_app(self._service, self._root_path)
        add_routes(app, self._follower, os.environ)
        return app

    def check_health(self) -> None:
        """Ray Serve calls this now and then, and replaces the replica when it raises."""
        if not self._service.ready:
            raise RuntimeError("the engine has stopped")


def application(options: ServeOptions) -> Application:
    """The Serve application of some options."""
    limits = options.limits
    settings = {
        # Ray Serve's own default of 5 would keep requests from the engine, which is the one to batch and refuse them.
        "max_ongoing_requests": limits.max_batch + limits.max_waiting + limits.arriving + _ALWAYS_ROOM,
        "ray_actor_options": {"num_cpus": options.threads, "num_gpus": options.gpus},
        # A replica that is taken away may finish the answers that it began.
        "graceful_shutdown_timeout_s": limits.deadline_seconds,
    }
    if options.routing == "session":
        settings["request_router_config"] = RequestRouterConfig(request_router_class=_BY_SESSION)
    if options.autoscaling is None:
        settings["num_replicas"] = options.replicas
    else:
        settings["autoscaling_config"] = {
            "min_replicas": options.replicas,
            "max_replicas": options.autoscaling.max_replicas,
            "target_ongoing_requests": options.autoscaling.requests_per_replica,
            "upscale_delay_s": options.autoscaling.upscale_seconds,
            "downscale_delay_s": options.autoscaling.downscale_seconds,
        }
    return ModelDeployment.options(**settings).bind(options.model_dump())
