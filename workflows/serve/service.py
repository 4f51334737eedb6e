"""From a request's body to its answers: what a replica serves, without HTTP."""

import asyncio
import dataclasses
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from mlmamba.processing import PromptTooLong
from workflows.registry import ResolvedModel
from workflows.serve.auth import Access, Gate
from workflows.serve.engine import ControlText, Engine, EngineClosed, QueueFull
from workflows.serve.grammar import Form, Grammar, GrammarError, Grammars
from workflows.serve.intake import Readers, inflated
from workflows.serve.messages import read_messages
from workflows.serve.metrics import default_metrics
from workflows.serve.openai import (
    ApiError,
    ChatRequest,
    Completion,
    Message,
    Request,
    bad_request,
    model_entry,
    model_id,
    parse_request,
    without_message,
)
from workflows.serve.options import Limits
from workflows.serve.remote_images import Fetcher
from workflows.serve.sampling import Answer, Delta, Prompt, Settings
from workflows.serve.sequence import DeadlineExceeded

logger = logging.getLogger(__name__)
T = TypeVar("T")
KEEP_ALIVE_SECONDS = 15  # proxies cut connections that are silent, as while a request waits for its slot
IMAGE_READERS = 2  # requests whose images are decoded at once; each may take image_pixels x 3 bytes
_SMALL = 2**20  # bytes of a body that is read at once, with the texts


@dataclass(frozen=True)
class Served:
    """A loaded model and where it came from."""

    engine: Engine
    source: ResolvedModel
    names: tuple[str, ...] = ()
    """Names under which clients ask for it, in place of the registered one; the first is the one that answers give."""

    @property
    def id(self) -> str:
        """The name under which clients ask for it; stays the same from version to version."""
        return self.names[0] if self.names else model_id(self.source)

    @property
    def headers(self) -> dict[str, str]:
        """What every response says about the model."""
        headers = {"x-model-version": quote(self.source.label)}
        return headers | ({"x-model-run-id": self.source.run_id} if self.source.run_id else {})

    def entry(self, since: int, name: str | None = None) -> dict[str, Any]:
        """Its entry of /v1/models."""
        entry = model_entry(self.source, since, self.engine.max_length, name or self.id, self.engine.max_sequence)
        own = {"computes_in": str(self.engine.prepared), "state_cache_bytes": self.engine.state_cache_bytes}
        problem = self.engine.keeping_problem
        return entry | own | ({"state_cache_problem": problem} if problem else {})

    def is_called(self, name: str | None) -> bool:
        """Whether a request for a model of this name means this one."""
        return name in (None, self.id, self.source.label, *self.names)

    def read(self, messages: list[Message], fetcher: Fetcher, gone: threading.Event) -> Prompt:
        """Messages to a prompt; nothing more is read once `gone` is set. Raises ApiError."""
        turns, images = read_messages(messages, self.engine.limits, self.engine.max_images, fetcher, gone.is_set)
        return self.prompted(self.engine.prepare, turns, images)

    def prompted(self, work: Callable[..., T], *args: Any) -> T:
        """The result of work that makes a prompt of messages, its errors as the client is told them: ApiError."""
        try:
            return work(*args)
        except ControlText as error:
            raise bad_request(str(error), "messages", "control_text") from error
        except PromptTooLong as error:
            raise bad_request(str(error), "messages", "context_length_exceeded") from error
        except ValueError as error:
            raise bad_request(str(error), "messages") from error


class Service:
    """What a replica serves. `served` is replaced as a whole; a request keeps the one that it began with.

    Args:
        limits: of the replica.
        access: keys and allowed addresses; everyone may ask and nothing is fetched by default.
        names: of the model, in place of the registered one.

    Raises:
        ValueError: the API keys cannot be read.
    """

    def __init__(self, limits: Limits, access: Access | None = None, names: tuple[str, ...] = ()):
        self.limits, self.access, self._names = limits, access or Access(), names
        self.gate = Gate(self.access.keys(dict(os.environ)), self.access.hosts, self.access.origins)
        self.metrics = default_metrics()
        self.fetcher = Fetcher(self.access.image_urls, limits.image_bytes, limits.fetch_seconds)
        self.since = int(time.time())
        self._served: Served | None = None
        self._text_readers, self._image_readers = Readers(1, "reader"), Readers(IMAGE_READERS, "image-reader")
        self._grammar_readers = Readers(2, "grammar-reader")  # a schema may take seconds; texts do not wait

    @property
    def served(self) -> Served | None:
        """The model, or None before one is loaded."""
        return self._served

    @served.setter
    def served(self, served: Served | None) -> None:
        if served is not None and self._names:
            served = dataclasses.replace(served, names=self._names)
        before, self._served = self._served, served
        if before is not None:
            before.engine.metrics.serving(False)
        if served is not None:
            served.engine.metrics = self.metrics.of_version(served.source.label)
            served.engine.metrics.serving(True)

    @property
    def ready(self) -> bool:
        """Whether a model is loaded and answers."""
        return self._served is not None and self._served.engine.alive

    def loaded(self) -> Served:
        """The model. Raises ApiError (503) when there is none yet."""
        if self._served is None:
            raise ApiError(503, "the model is still being loaded; try again", code="model_loading", retry_after=5)
        return self._served

    async def inflate(self, body: bytes, client: str) -> bytes:
        """A body that gzip compressed. It takes a turn of those that read images. Raises ApiError."""
        return await self._image_readers.run(client, inflated, body, self.limits.body_bytes)

    async def read_tokens(self, body: bytes, client: str, form: type[Request], work: Callable[..., dict]) -> dict:
        """What `work(served, request, limits)` makes of a request of some form. Raises ApiError."""

        def read() -> dict:
            request = parse_request(body, self.limits, form)
            return work(self.asked_for(request.model), request, self.limits)

        self.loaded()
        readers = self._text_readers if len(body) <= _SMALL else self._image_readers
        return await readers.run(client, read)

    def asked_for(self, model: str | None) -> Served:
        """The model, which the request names so. Raises ApiError (404, 503)."""
        served = self.loaded()
        if not served.is_called(model):
            message = f"the model that was asked for is not served here; ask for {served.id!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return served

    async def begin(self, body: bytes, client: str = "") -> "Conversation":
        """Read the body of a chat completion request and queue it. Text does not wait for images. Raises ApiError.

        Args:
            body: as sent.
            client: who asks; clients have their turns one after the other.
        """
        self.loaded()
        readers = self._text_readers if len(body) <= _SMALL else self._image_readers
        request = await readers.run(client, parse_request, body, self.limits)
        readers = self._image_readers if request.shows_images else self._text_readers
        while True:
            served = self.asked_for(request.model)
            settings = read_settings(request, self.limits)
            if request.gives_form:
                form = await self._text_readers.run(client, read_form, request, self.limits)
                grammars = served.engine.grammars
                grammar = grammars.find(form) or await self._grammar_readers.run(client, compile_form, grammars, form)
                settings = [dataclasses.replace(one, grammar=grammar) for one in settings]
            gone = threading.Event()
            try:
                prompt = await readers.run(client, served.read, request.messages, self.fetcher, gone)
            finally:
                gone.set()
            try:
                return Conversation(served, request, prompt, settings, client)
            except EngineClosed as error:
                if self._served is served:
                    raise api_error(error) from error
                # The model was replaced while the request was read: the new one answers it, from the beginning.


class Events:
    """What the answers to a request added, in order. Pieces of one answer that wait together become one: a client that
    reads slowly, or a busy server, has fewer events to deal with."""

    def __init__(self):
        self._waiting: deque[tuple[int, Delta | None]] = deque()
        self._there = asyncio.Event()

    def put(self, index: int, delta: Delta | None) -> None:
        """Add a piece of answer `index`, or None for its end."""
        last = self._waiting[-1] if self._waiting else None
        if last is not None and delta is not None and last[0] == index and last[1] is not None:
            self._waiting[-1] = (index, Delta(last[1].text + delta.text, last[1].logprobs + delta.logprobs))
        else:
            self._waiting.append((index, delta))
        self._there.set()

    async def get(self) -> tuple[int, Delta | None]:
        """The next, waiting for it."""
        while not self._waiting:
            self._there.clear()
            await self._there.wait()
        return self._waiting.popleft()


class Conversation:
    """A request in the engine's queue, and what comes of it.

    Raises:
        ApiError: the queue is full.
        EngineClosed: the model was replaced.
    """

    def __init__(
        self, served: Served, request: ChatRequest, prompt: Prompt, settings: list[Settings], client: str = ""
    ):
        self.served, self.streams = served, bool(request.stream)
        self.images = len(prompt.shown)
        self.answers: list[Answer] = []
        self._usage = bool(request.stream_options and request.stream_options.include_usage)
        self._completion = Completion(served.id, served.source.label, settings[0].logprobs is not None)
        self._events = Events()
        self._loop = asyncio.get_running_loop()
        asked = [(own, self._listener(index) if self.streams else None) for index, own in enumerate(settings)]
        try:
            self._futures: list[Future[Answer]] = served.engine.submit_all(prompt, asked, client)
        except QueueFull as error:
            raise api_error(error) from error

    @property
    def id(self) -> str:
        """Of the completion."""
        return self._completion.id

    async def whole(self) -> dict[str, Any]:
        """The response body, when all answers are whole. Cancelling this gives them up. Raises ApiError."""
        try:
            self.answers = list(await asyncio.gather(*map(asyncio.wrap_future, self._futures)))
        except Exception as error:
            raise api_error(error) from error
        finally:
            self.cancel()
        return self._completion.whole(self.answers)

    async def events(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The events of the stream, None where there was none for a while. Closing this gives the answers up.

        Raises:
            ApiError: an answer failed.
        """
        for index, future in enumerate(self._futures):
            future.add_done_callback(lambda _, index=index: self._post(index, None))
        try:
            for index in range(len(self._futures)):
                yield self._with_usage(self._completion.opening(index))
            left = len(self._futures)
            while left:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                        index, delta = await self._events.get()
                except TimeoutError:
                    yield None
                    continue
                if delta is not None:
                    yield self._with_usage(self._completion.piece(index, delta))
                    continue
                left -= 1
                answer = self._result(index)
                self.answers.append(answer)
                yield self._with_usage(self._completion.closing(index, answer))
            if self._usage:
                yield self._completion.totals(self.answers)
        finally:
            self.cancel()

    def _with_usage(self, event: dict[str, Any]) -> dict[str, Any]:
        return event | {"usage": None} if self._usage else event

    def _result(self, index: int) -> Answer:
        try:
            return self._futures[index].result()
        except Exception as error:
            raise api_error(error) from error

    def _listener(self, index: int) -> Callable[[Delta], None]:
        return lambda delta: self._post(index, delta)

    def _post(self, index: int, delta: Delta | None) -> None:
        """From the engine's thread. Raises RuntimeError when the event loop has ended."""
        self._loop.call_soon_threadsafe(self._events.put, index, delta)

    def cancel(self) -> None:
        """Give up the answers that are not finished."""
        for future in self._futures:
            future.cancel()


def read_settings(request: ChatRequest, limits: Limits) -> list[Settings]:
    """The settings of each answer that a request asks for; a seed counts up from one to the next. Raises ApiError."""
    field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked = getattr(request, field)
    if asked is not None and asked > limits.max_tokens:
        raise bad_request(f"{field} = {asked} is over this server's limit of {limits.max_tokens}", field)
    count = request.n or 1
    if count > limits.max_choices:
        raise bad_request(f"n = {count} is over this server's limit of {limits.max_choices}", "n")
    settings = Settings(
        max_tokens=asked or min(limits.default_tokens, limits.max_tokens),
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=tuple(request.stop or ()),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    if settings.seed is None or count == 1:
        return [settings] * count
    return [dataclasses.replace(settings, seed=settings.seed + i) for i in range(count)]


def read_form(request: ChatRequest, limits: Limits) -> Form:
    """The form that a request gives its answers. Raises ApiError."""
    try:
        return request.form(limits.schema_bytes)
    except GrammarError as error:
        raise api_error(error) from error


def compile_form(grammars: Grammars, form: Form) -> Grammar:
    """A form compiled. Raises ApiError."""
    try:
        return grammars.compile(form)
    except GrammarError as error:
        raise api_error(error) from error


def api_error(error: Exception) -> ApiError:
    """What a client is told about an error. One that nobody foresaw is logged, and tells nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), code="model_stopping", retry_after=1)
    if isinstance(error, GrammarError):
        return bad_request(str(error), error.param, "invalid_schema")
    if isinstance(error, DeadlineExceeded):  # OpenAI's client would ask again for what takes too long
        return ApiError(504, str(error), code="deadline_exceeded", extra={"x-should-retry": "false"})
    logger.error("a request failed: %s", without_message(error))
    return ApiError(500, "the server failed to answer; its log says where", code="internal")
