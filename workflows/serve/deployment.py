"""The Ray Serve deployment: one replica is one process with one model and its engine.

`application` builds it from typed options, for `mlmamba serve` and for a Serve config file alike
(`import_path: workflows.serve.deployment:application`, the options under `args`).
"""

from pathlib import Path

from pydantic import Field
from ray import serve
from ray.serve import Application

from pipelines.config import StrictModel
from workflows.serve.limits import Limits

_ALWAYS_ROOM = 32  # calls beyond batch and queue that reach the replica: health checks, and those that get a 429


class ServeOptions(StrictModel):
    """What to serve and with what."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder."""
    storage: str
    """The storage folder, for its registry."""
    replicas: int = Field(1, gt=0)
    """Processes, each with its own copy of the model."""
    threads: int = Field(1, gt=0)
    """CPU cores, and torch threads, of one replica."""
    gpus: int = Field(0, ge=0, le=1)
    """GPUs of one replica."""
    limits: Limits = Limits()
    """Limits of one replica."""


@serve.deployment(name="mlmamba", max_constructor_retry_count=2)
@serve.ingress()
class ModelDeployment:
    """Loads the model before it counts as running, so Ray Serve sends requests only to replicas that can answer."""

    def __init__(self, options: dict):
        from workflows.runtime import quiet_libraries

        quiet_libraries()
        from mlmamba.loading import load_model
        from workflows.registry import resolve_model
        from workflows.serve.app import Served, Service
        from workflows.serve.engine import Engine

        chosen = ServeOptions.model_validate(options)
        self._service = Service(chosen.limits)
        source = resolve_model(chosen.model, Path(chosen.storage))
        engine = Engine(*load_model(source.folder), chosen.limits, chosen.threads)
        engine.warm_up()
        self._service.served = Served(engine, source)

    def __serve_build_asgi_app__(self):
        """The HTTP interface; Ray Serve calls this after the constructor."""
        from workflows.serve.app import build_app

        return build_app(self._service)

    def check_health(self) -> None:
        """Ray Serve calls this now and then, and replaces the replica when it raises."""
        if not self._service.ready:
            raise RuntimeError("the engine has stopped")


def application(options: ServeOptions) -> Application:
    """The Serve application of some options."""
    limits = options.limits
    return ModelDeployment.options(
        num_replicas=options.replicas,
        # Ray Serve's own default of 5 would keep requests from the engine, which is the one to batch and refuse them.
        max_ongoing_requests=limits.max_batch + limits.max_waiting + _ALWAYS_ROOM,
        ray_actor_options={"num_cpus": options.threads, "num_gpus": options.gpus},
    ).bind(options.model_dump())
