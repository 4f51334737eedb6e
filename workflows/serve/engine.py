"""The engine: one model, one worker thread, a bounded queue. Requests that wait are answered together."""

import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from mlmamba.conversation import Turn
from mlmamba.pictures import to_pixels
from workflows.serve.errors import without_message
from workflows.serve.generation import Answer, Prompt, Settings, generate
from workflows.serve.limits import Limits

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests wait as may. `retry_after` is a guess, in seconds, of when there is room again."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class EngineClosed(Exception):
    """The engine takes no more requests."""

    def __init__(self):
        super().__init__("the model is being stopped; try again in a moment")


@dataclass
class _Job:
    prompt: Prompt
    settings: Settings
    future: "Future[Answer]" = field(default_factory=Future)


class Engine:
    """Answers requests with one model.

    Args:
        model: in evaluation mode, on its device. The engine is its only user from now on.
        processor: the model's processor.
        limits: batch and queue sizes.
        threads: torch threads; None leaves them.
    """

    def __init__(self, model, processor, limits: Limits | None = None, threads: int | None = None):
        self.limits = limits or Limits()
        self._model, self._processor = model, processor
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._batch_seconds = 1.0
        self._worker = threading.Thread(target=self._work, args=(threads,), name="engine", daemon=True)
        self._worker.start()

    @property
    def max_pictures(self) -> int:
        """Pictures that the longest prompt has room for."""
        return self._processor.max_length // self._processor.tokens_per_image

    @property
    def alive(self) -> bool:
        """Whether requests are still answered."""
        return self._worker.is_alive() and not self._closed

    def warm_up(self) -> None:
        """Answer one question about a blank picture: a model that cannot fails here, before anyone asks it."""
        size = self._processor.image_size
        prompt = self.prepare([Turn("user", "?", images=1)], [Image.new("RGB", (size, size))])
        self.submit(prompt, Settings(max_tokens=2)).result()

    def prepare(self, turns: list[Turn], pictures: list[Image.Image]) -> Prompt:
        """Tokenize turns and resize their pictures, in the caller's thread.

        Raises:
            ValueError: the turns break the rules of a conversation, or the prompt is too long.
        """
        text = self._processor.prompt(turns)
        pixels = None
        if pictures:
            pixels = torch.from_numpy(np.stack([to_pixels(p, self._processor.image_size) for p in pictures]))
        return Prompt(self._processor.tokenize([text])["input_ids"][0], pixels)

    def submit(self, prompt: Prompt, settings: Settings) -> "Future[Answer]":
        """Queue a request. Cancelling the future takes it out of the queue.

        Raises:
            QueueFull: try again later.
            EngineClosed: the engine was closed.
        """
        job = _Job(prompt, settings)
        with self._changed:
            if self._closed:
                raise EngineClosed
            if len(self._waiting) >= self.limits.max_waiting:
                self._waiting = deque(job for job in self._waiting if not job.future.cancelled())
            if len(self._waiting) >= self.limits.max_waiting:
                batches = len(self._waiting) / self.limits.max_batch
                raise QueueFull(len(self._waiting), min(60, max(1, math.ceil(batches * self._batch_seconds))))
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Take no more requests, answer those that wait, and return when that is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    def _work(self, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)  # here, because OpenMP keeps the number per thread
        while jobs := self._take():
            start = time.monotonic()
            self._answer(jobs)
            self._batch_seconds = 0.5 * self._batch_seconds + 0.5 * (time.monotonic() - start)

    def _take(self) -> list[_Job]:
        """The next batch, waiting for one; empty when the engine is closed and all is answered.

        The first in the queue decides: one that samples goes alone, a greedy one takes other greedy ones along.
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                jobs: list[_Job] = []
                later: deque[_Job] = deque()
                for job in self._waiting:
                    fits = not jobs or (jobs[0].settings.greedy and job.settings.greedy)
                    if not fits or len(jobs) == self.limits.max_batch:
                        later.append(job)
                    elif job.future.set_running_or_notify_cancel():
                        jobs.append(job)
                self._waiting = later
                if jobs:
                    return jobs

    def _answer(self, jobs: list[_Job]) -> None:
        try:
            answers = generate(self._model, self._processor, [j.prompt for j in jobs], [j.settings for j in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            logger.error("a batch of %d failed, each is tried alone: %s", len(jobs), without_message(error))
            for job in jobs:  # one request must not fail its neighbours
                self._answer([job])
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.future.set_result(answer)
