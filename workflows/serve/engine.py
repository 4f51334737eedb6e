"""The engine: one model, one worker thread, a bounded queue, and a batch that requests join and leave at any step."""

import dataclasses
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import torch
from PIL import Image

from mlmamba.conversation import IMAGE_TOKEN, Turn, clean, format_of
from mlmamba.decoding import prepare
from mlmamba.state_cache import Places, image_digest
from workflows.serve.batch import Batch
from workflows.serve.detokenize import TokenText
from workflows.serve.grammar import Grammars
from workflows.serve.intake import FairQueue
from workflows.serve.metrics import Metrics
from workflows.serve.openai import without_message
from workflows.serve.options import Limits
from workflows.serve.reading import Reading
from workflows.serve.sampling import Answer, Delta, Prompt, Settings
from workflows.serve.sequence import Sequence

logger = logging.getLogger(__name__)
_RECENT = 60.0  # seconds for which a client that asked counts as there


class QueueFull(Exception):
    """As many requests wait as may. `retry_after` is a guess, in seconds, of when there is room again."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class EngineClosed(Exception):
    """The engine takes no more requests."""

    def __init__(self):
        super().__init__("the model is being stopped; try again in a moment")


class ControlText(ValueError):
    """A message holds text that the prompt format or the tokenizer uses as a mark."""

    def __init__(self, turn: Turn, mark: str):
        super().__init__(
            f"a message of the {turn.role} holds {mark}, a mark of the prompt format; write it in another way"
        )


def _check_count(turns: list[Turn], given: int) -> None:
    if given != (shown := sum(turn.images for turn in turns)):
        raise ValueError(f"the turns show {shown} images, {given} were given")


class Engine:
    """Answers requests with one model.

    Args:
        model: in evaluation mode, on its device. The engine is its only user from now on.
        processor: the model's processor.
        limits: batch and queue sizes.
        threads: torch threads; None leaves them.

    Attributes:
        grammars: compiles the forms of answers, for `Settings.grammar`.
    """

    def __init__(self, model, processor, limits: Limits | None = None, threads: int | None = None):
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self._model, self._processor = model, processor
        self.prepared = prepare(model)
        self._text, self._places = TokenText(processor.tokenizer), Places(processor)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.grammars = Grammars(
            processor.tokenizer, model.config.text_config.vocab_size, [e for e in ends if e is not None]
        )
        self._batch = Batch(model, self._text, self.limits)
        self._waiting: FairQueue[Sequence] = FairQueue()
        self._seen: dict[str, float] = {}  # when each client last asked
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 1.0  # that an answer takes, from slot to end
        self._worker = threading.Thread(target=self._work, args=(threads,), name="engine", daemon=True)
        self._worker.start()

    @property
    def max_images(self) -> int:
        """Images that the longest prompt has room for, and one request may show."""
        return min(self.max_length // self._processor.layout.fewest, self.limits.images)

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt, placeholders of images included."""
        return min(self._processor.max_length, self.limits.max_model_len or self._processor.max_length)

    @property
    def max_sequence(self) -> int | None:
        """Tokens of the longest prompt and answer together; None where there is no such limit, as in a pure Mamba-2."""
        return self._batch.pool.limit or None

    @property
    def state_cache_bytes(self) -> int:
        """Most bytes of kept states; 0 where none are kept."""
        return self._batch.cache.limit

    @property
    def keeping_problem(self) -> str:
        """Why no states are kept, where some should be; else ""."""
        return self._batch.keeping_problem

    @property
    def kept_bytes(self) -> int:
        """Bytes of the states that are kept."""
        return self._batch.cache.nbytes

    @property
    def alive(self) -> bool:
        """Whether requests are still answered."""
        return self._worker.is_alive() and not self._closed

    @property
    def load(self) -> tuple[int, int]:
        """Requests that wait, and those in slots."""
        return len(self._waiting), len(self._batch)

    def warm_up(self) -> None:
        """Answer one question about a blank image: a model that cannot fails here, before anyone asks it."""
        layout = self._processor.layout
        size = layout.patch or layout.image_size
        prompt = self.prepare([Turn("user", "?", images=1)], [Image.new("RGB", (size, size))])
        self.submit(prompt, Settings(max_tokens=2)).result()

    def prepare(self, turns: list[Turn], images: Iterable[Image.Image]) -> Prompt:
        """Tokenize turns and resize their images, in the caller's thread.

        Images are taken one by one after the text has passed, so an iterable that decodes them holds one at a time.
        Where their sizes decide how many tokens they take, an iterable that has `sizes` is not asked for an image that
        does not fit.

        Raises:
            ControlText: a message holds a mark of the prompt format or a special token.
            ValueError: the turns break the rules of a conversation, or the prompt is too long.
        """
        ids, images = self._tokenize(turns, images)
        shown = tuple(self._processor.layout.cut(image) for image in images)
        _check_count(turns, len(shown))
        digests = tuple(image_digest(image.pixels, image.grid) for image in shown)
        places = self._places.of(ids, digests, turns[0], [image.tokens for image in shown])
        return Prompt(torch.tensor(ids), shown, digests, places)

    def prompt_ids(self, turns: list[Turn], images: Iterable[Image.Image] = ()) -> list[int]:
        """Token ids of the prompt for some turns, however many, each image as its placeholders. Raises as `prepare`.

        Args:
            images: as for `prepare`; only their sizes are looked at, and only where these decide.
        """
        return self._tokenize(turns, images, cut=False)[0]

    def _tokenize(
        self, turns: list[Turn], images: Iterable[Image.Image], cut: bool = True
    ) -> tuple[list[int], Iterable[Image.Image]]:
        self._refuse_marks(turns)
        prompt, sizes = self._processor.prompt(turns), None
        if self._processor.layout.fixed is None:
            if not hasattr(images, "sizes"):
                images = list(images)
            sizes = images.sizes if hasattr(images, "sizes") else [image.size for image in images]
            _check_count(turns, len(sizes))
        if cut:
            batch = self._processor.tokenize([prompt], image_sizes=sizes, max_length=self.max_length)
            return batch["input_ids"][0].tolist(), images
        return self._processor.ids([prompt], sizes)[0], images

    @property
    def tokenizer(self):
        """The model's."""
        return self._processor.tokenizer

    def submit(
        self,
        prompt: Prompt,
        settings: Settings,
        on_delta: Callable[[Delta], None] | None = None,
        client: str = "",
    ) -> "Future[Answer]":
        """Queue a request. Cancelling the future takes it out of the queue, or out of the batch before the next step.

        Clients share queue and batch: slots go to the one that has fewest; where several ask, an eighth of the slots is
        never one client's alone; and in a full queue the newest request of the one that has most gives way.

        Args:
            settings: where the state has room for less than its max_tokens, that is the answer's longest.
            on_delta: called with each piece of the answer, in the engine's thread; must return at once.
            client: who asks, and whose kept states are found; empty for the service itself, of which none are kept.

        Raises:
            QueueFull: try again later.
            EngineClosed: the engine was closed.

        The future's own errors: DeadlineExceeded, QueueFull where it had to give way, or whatever the model raised.
        """
        return self.submit_all(prompt, [(settings, on_delta)], client)[0]

    def submit_all(
        self, prompt: Prompt, answers: list[tuple[Settings, Callable[[Delta], None] | None]], client: str = ""
    ) -> "list[Future[Answer]]":
        """`submit`, for several answers to one prompt, which is read once. None is queued where not all are."""
        reading = Reading(prompt, client, len(answers))
        room = None if self.max_sequence is None else self.max_sequence - len(prompt.input_ids) + 1
        queued: list[Sequence] = []
        try:
            for settings, on_delta in answers:
                if room is not None:  # the last token of an answer is not read any more
                    settings = dataclasses.replace(settings, max_tokens=min(settings.max_tokens, room))
                deadline = self.limits.deadline_seconds
                sequence = Sequence(reading, settings, self._text, deadline, on_delta, client)
                self._queue(sequence)
                queued.append(sequence)
        except (QueueFull, EngineClosed):
            for sequence in queued:
                sequence.future.cancel()
            raise
        return [sequence.future for sequence in queued]

    def _queue(self, sequence: Sequence) -> None:
        sequence.metrics = self.metrics
        with self._changed:
            if self._closed or not self._worker.is_alive():
                raise EngineClosed
            if sequence.client:
                self._seen[sequence.client] = sequence.arrived
            if len(self._waiting) >= self.limits.max_waiting:
                self._waiting.drop(lambda waiting: waiting.over)
            if len(self._waiting) >= self.limits.max_waiting:
                last = self._waiting.give_way(sequence.client)
                if last is None:
                    raise self._queue_full()
                last.fail(self._queue_full())
            self._waiting.put(sequence.client, sequence)
            self._changed.notify()

    def _queue_full(self) -> QueueFull:
        rounds = math.ceil(len(self._waiting) / self.limits.max_batch)
        return QueueFull(len(self._waiting), min(60, max(1, math.ceil(rounds * self._seconds))))

    def close(self) -> None:
        """Take no more requests, answer those that wait, and return when that is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    def _refuse_marks(self, turns: list[Turn]) -> None:
        special = [name for name in self._text.special.values() if name != IMAGE_TOKEN]
        for turn in turns:
            # A model may have written marks that are no special tokens, and its answers come back as history.
            marks = special if turn.role == "assistant" else [*special, *format_of(self.tokenizer).marks]
            text = clean(turn.text)  # a mark may appear when a placeholder is taken out
            for mark in marks:
                if mark in text:
                    raise ControlText(turn, mark)

    def _work(self, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)  # here, because OpenMP keeps the number per thread
        try:
            while self._admit():
                self._batch.step()
                self._look_after()
        except BaseException as error:  # a fault of the engine itself: nothing may wait for ever
            logger.critical("the engine has stopped: %s", without_message(error))
            with self._changed:
                self._closed = True
                left, self._waiting = [*self._waiting], FairQueue()
            self._batch.fail_all(EngineClosed())
            for sequence in left:
                sequence.fail(EngineClosed())

    def _admit(self) -> bool:
        """Move requests from the queue to the batch, waiting for one; False when closed and all is answered."""
        with self._changed:
            if not len(self._batch):
                self.metrics.load(0, 0, self.kept_bytes)
                self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                self._batch.cache.close()  # nothing of it is for the model that comes next
            now = time.monotonic()
            rank = self._rank(now) if self._waiting else None
            while self._batch.room and (sequence := self._waiting.take(rank)):
                sequence.check_deadline(now)
                if sequence.over:
                    sequence.leave_reading()
                else:
                    sequence.began = now
                    self._batch.add(sequence)
                    rank = self._rank(now)
            return bool(len(self._batch) or self._waiting or not self._closed)

    def _rank(self, now: float) -> Callable[[str], float]:
        """Slots that a client has; infinite where it has as many as it may while others ask."""
        self._seen = {client: time for client, time in self._seen.items() if now - time < _RECENT}
        slots = Counter(sequence.client for sequence in (*self._batch.reading, *self._batch.running))
        kept = max(1, self.limits.max_batch // 8) if len(self._seen) > 1 and self.limits.max_batch > 1 else 0
        return lambda client: slots[client] if slots[client] < self.limits.max_batch - kept else math.inf

    def _look_after(self) -> None:
        """Deadlines and measurements, between two steps."""
        now = time.monotonic()
        for sequence in (*self._batch.reading, *self._batch.running, *self._waiting_now()):
            sequence.check_deadline(now)
        for sequence in self._batch.take_ended():
            if sequence.ended is not None and sequence.began is not None:
                self._seconds = 0.8 * self._seconds + 0.2 * (sequence.ended - sequence.began)
            if sequence.future.done() and not sequence.future.cancelled() and sequence.future.exception() is None:
                sequence.metrics.answer(sequence.future.result())
        self.metrics.load(len(self._waiting), len(self._batch), self.kept_bytes)

    def _waiting_now(self) -> list[Sequence]:
        with self._changed:
            return list(self._waiting)
