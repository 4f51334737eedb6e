"""Measurements of a replica: on Ray's Prometheus endpoint inside Ray Serve, plain numbers elsewhere.

| name (Ray puts `ray_` before it) | kind | what |
|---|---|---|
| mlmamba_requests_total | counter | requests, by `status` |
| mlmamba_request_seconds | histogram | from the request's head to the response's end |
| mlmamba_prompt_tokens_total, mlmamba_completion_tokens_total | counter | tokens read and made |
| mlmamba_cached_tokens_total | counter | prompt tokens that were not read, because a state of them was kept |
| mlmamba_state_cache_hits_total, mlmamba_state_cache_misses_total | counter | answers with cached tokens, and without |
| mlmamba_queue_seconds | histogram | from arrival to a slot |
| mlmamba_first_token_seconds | histogram | from arrival to the first token |
| mlmamba_token_seconds | histogram | an answer's mean time from token to token |
| mlmamba_waiting_requests, mlmamba_slots_in_use | gauge | the queue and the batch |
| mlmamba_state_cache_bytes | gauge | host memory of kept states |
| mlmamba_model_info | gauge | 1 for the version that is served now, 0 for one that was |

Each carries the tag `version`, the label of the model that answered. GET /metrics has the same numbers, without `ray_`,
of the replica that answers it (its tag `replica`): enough for one replica. Ray's endpoint has those of all.
"""

import contextlib
import sys
import threading
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from workflows.serve.sampling import Answer

COUNTERS = {
    "mlmamba_requests_total": "Requests by HTTP status.",
    "mlmamba_prompt_tokens_total": "Prompt tokens read, placeholders of images included.",
    "mlmamba_completion_tokens_total": "Tokens of answers.",
    "mlmamba_cached_tokens_total": "Prompt tokens that were not read, because a state of them was kept.",
    "mlmamba_state_cache_hits_total": "Answers whose prompt went on from a kept state.",
    "mlmamba_state_cache_misses_total": "Answers whose prompt was read from its beginning.",
}
_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300]
_TOKEN_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5]
HISTOGRAMS = {
    "mlmamba_request_seconds": ("From the request's head to the response's end.", _SECONDS),
    "mlmamba_queue_seconds": ("From a request's arrival to its slot.", _SECONDS),
    "mlmamba_first_token_seconds": ("From a request's arrival to its first token.", _SECONDS),
    "mlmamba_token_seconds": ("Mean time from token to token of an answer.", _TOKEN_SECONDS),
}
GAUGES = {
    "mlmamba_waiting_requests": "Requests that wait for a slot.",
    "mlmamba_slots_in_use": "Requests in slots.",
    "mlmamba_state_cache_bytes": "Host memory of kept states.",
    "mlmamba_model_info": "1 for the version that is served, 0 for one that was.",
}
_GAUGE_SECONDS = 0.5  # a step can take a millisecond, and setting a gauge of Ray's is not free


class Metrics:
    """Plain numbers, in `values` by name and tags. `RayMetrics` sends them on instead.

    Args:
        version: label of the model.
        parent: where the numbers go; by default an object of its own.
        replica: the replica that counts.
    """

    def __init__(self, version: str = "", parent: "Metrics | None" = None, replica: str = ""):
        self._tags = {"version": version}
        self._parent = parent
        self._last: tuple[int, int, int] | None = None
        self._page = Page(replica) if parent is None else None
        self._last_time = 0.0
        self._lock = threading.Lock()
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def of_version(self, version: str) -> "Metrics":
        """The same measurements, with this version's tag."""
        return Metrics(version, self)

    def request(self, status: int, seconds: float) -> None:
        """A response has ended."""
        self._count("mlmamba_requests_total", 1, status=str(status))
        self._observe("mlmamba_request_seconds", seconds)

    def answer(self, answer: Answer) -> None:
        """An answer is whole."""
        self._count("mlmamba_prompt_tokens_total", answer.prompt_tokens)
        self._count("mlmamba_completion_tokens_total", answer.completion_tokens)
        self._count("mlmamba_cached_tokens_total", answer.cached_tokens)
        self._count(f"mlmamba_state_cache_{'hits' if answer.cached_tokens else 'misses'}_total", 1)
        if answer.timing is not None:
            self._observe("mlmamba_queue_seconds", answer.timing.queued)
            self._observe("mlmamba_first_token_seconds", answer.timing.first_token)
            if answer.completion_tokens > 1:
                gaps = answer.completion_tokens - 1
                self._observe("mlmamba_token_seconds", (answer.timing.total - answer.timing.first_token) / gaps)

    def load(self, waiting: int, running: int, kept: int = 0) -> None:
        """How full queue and slots are, and the bytes of kept states. May be called at every step: sent on when it
        changed, twice a second at most, and whenever all has become idle."""
        now = time.monotonic()
        if (waiting, running, kept) == self._last or (waiting + running and now - self._last_time < _GAUGE_SECONDS):
            return
        self._last, self._last_time = (waiting, running, kept), now
        self._set("mlmamba_waiting_requests", waiting)
        self._set("mlmamba_slots_in_use", running)
        self._set("mlmamba_state_cache_bytes", kept)

    def serving(self, served: bool) -> None:
        """Whether this version is the one that is served."""
        self._set("mlmamba_model_info", float(served))

    def _count(self, name: str, amount: float, **tags: str) -> None:
        self.add(name, amount, {**self._tags, **tags})

    def _observe(self, name: str, value: float) -> None:
        self.observe(name, value, self._tags)

    def _set(self, name: str, value: float) -> None:
        self.set(name, value, self._tags)

    def add(self, name: str, amount: float, tags: dict[str, str]) -> None:
        """Add to a counter."""
        if self._parent is not None:
            self._parent.add(name, amount, tags)
            return
        with self._lock:
            key = (name, tuple(sorted(tags.items())))
            self.values[key] = self.values.get(key, 0) + amount
        if name in COUNTERS:
            self._page.of(name, tags).inc(amount)

    def page(self) -> bytes:
        """All of it, in the text format of Prometheus."""
        return self._parent.page() if self._parent is not None else generate_latest(self._page.registry)

    def observe(self, name: str, value: float, tags: dict[str, str]) -> None:
        """One value of a histogram: kept here as its count and its sum."""
        if self._parent is not None:
            self._parent.observe(name, value, tags)
            return
        self.add(f"{name}_count", 1, tags)
        self.add(f"{name}_sum", value, tags)
        self._page.of(name, tags).observe(value)

    def set(self, name: str, value: float, tags: dict[str, str]) -> None:
        """Set a gauge."""
        if self._parent is not None:
            self._parent.set(name, value, tags)
            return
        with self._lock:
            self.values[(name, tuple(sorted(tags.items())))] = value
        self._page.of(name, tags).set(value)


def tag_keys(name: str) -> tuple[str, ...]:
    """The tags of a measurement."""
    return ("version", "status") if name == "mlmamba_requests_total" else ("version",)


class Page:
    """The measurements as prometheus_client keeps them."""

    def __init__(self, replica: str):
        self.registry, self._replica = CollectorRegistry(), replica
        made = {name: (Counter, text, {}) for name, text in COUNTERS.items()}
        made |= {name: (Histogram, text, {"buckets": bounds}) for name, (text, bounds) in HISTOGRAMS.items()}
        made |= {name: (Gauge, text, {}) for name, text in GAUGES.items()}
        self._made = {
            name: kind(name, text, (*tag_keys(name), "replica"), registry=self.registry, **options)
            for name, (kind, text, options) in made.items()
        }

    def of(self, name: str, tags: dict[str, str]):
        """The counter, gauge or histogram with these tags."""
        return self._made[name].labels(**tags, replica=self._replica)


class RayMetrics(Metrics):
    """The same on Ray's Prometheus endpoint. Ray Serve adds the tags deployment, replica and application."""

    def __init__(self, replica: str):
        super().__init__(replica=replica)
        from ray.serve import metrics

        self._counters = {name: metrics.Counter(name, text, tag_keys=tag_keys(name)) for name, text in COUNTERS.items()}
        self._histograms = {
            name: metrics.Histogram(name, text, boundaries=bounds, tag_keys=("version",))
            for name, (text, bounds) in HISTOGRAMS.items()
        }
        self._gauges = {name: metrics.Gauge(name, text, tag_keys=("version",)) for name, text in GAUGES.items()}

    def add(self, name: str, amount: float, tags: dict[str, str]) -> None:
        super().add(name, amount, tags)
        if amount > 0 and name in self._counters:  # Ray's counters take nothing else
            self._counters[name].inc(amount, tags)

    def observe(self, name: str, value: float, tags: dict[str, str]) -> None:
        super().observe(name, value, tags)
        self._histograms[name].observe(value, tags)

    def set(self, name: str, value: float, tags: dict[str, str]) -> None:
        super().set(name, value, tags)
        self._gauges[name].set(value, tags)


def default_metrics() -> Metrics:
    """Ray's inside a replica of Ray Serve, plain numbers elsewhere. Imports Ray only where it runs already."""
    if "ray.serve" in sys.modules:
        from ray import serve
        from ray.serve.exceptions import RayServeException

        with contextlib.suppress(RayServeException):  # not in a replica
            return RayMetrics(serve.get_replica_context().replica_id.unique_id)
    return Metrics()
