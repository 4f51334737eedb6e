"""What Ray Train's own processes load: the workers' entry point, and the events on their way back to the driver.

Light on imports, because Ray Train's controller loads this file too.
"""

import logging
import threading
from collections.abc import Callable

import ray
from ray.train import UserCallback

OnEvent = Callable[[dict], None]
logger = logging.getLogger(__name__)


def run_job(config: dict) -> dict:
    """Run the StageJob in `config["job"]`; torch, DeepSpeed and the model are imported here, not in the controller."""
    from workflows.train.loop import train_stage

    return train_stage(config["job"])


@ray.remote(num_cpus=0)
class EventLog:
    """An actor that holds events until the driver takes them."""

    def __init__(self):
        self._events: list[dict] = []

    def add(self, event: dict) -> None:
        self._events.append(event)

    def take(self) -> list[dict]:
        events, self._events = self._events, []
        return events


class Failures(UserCallback):
    """Callback in Ray Train's controller that reports a failed worker as an event."""

    def __init__(self, log):
        self._log = log

    def after_exception(self, run_context, worker_exceptions) -> None:
        rank, error = next(iter(worker_exceptions.items()))
        lines = str(error).strip().splitlines() or [""]
        text = f"worker {rank} failed: {type(error).__name__}: {lines[-1][:200]}"
        self._log.add.remote({"event": "failure", "text": text})


class Pump(threading.Thread):
    """A thread that hands events from the log to the driver's callback until stopped.

    An event on which the callback fails is dropped with a warning, so that training does not end because a line of its
    log could not be written.
    """

    def __init__(self, log, on_event: OnEvent):
        super().__init__(name="train-events", daemon=True)
        self._log, self._on_event, self._stopped = log, on_event, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.5):
            self._drain()

    def stop(self) -> None:
        """Hand over the remaining events and end the thread."""
        self._stopped.set()
        self.join()
        self._drain()

    def _drain(self) -> None:
        try:
            events = ray.get(self._log.take.remote(), timeout=60)
        except ray.exceptions.RayError as error:
            logger.warning("training events are lost: %s", error)
            return
        for event in events:
            try:
                self._on_event(event)
            except Exception as error:
                logger.warning("a training event is lost (%s): %s", event.get("event"), error)
