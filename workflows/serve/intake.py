"""What comes in, under limits: request bodies as they arrive, and turns of the threads that read them.

No client may keep the others waiting. Starlette has a limit on the size of one body (`max_body_size`), which answers in
plain text where clients of OpenAI's API expect an error in JSON, and none on all bodies together or on their time.
"""

import asyncio
import math
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

from fastapi import Request

from workflows.serve.openai import ApiError, bad_request
from workflows.serve.options import Limits

T = TypeVar("T")


class Bodies:
    """Reads request bodies. There is room for so many at once and for so many bytes in all; when more come, the body
    that has made no progress for longest is given up (408). A body that comes at once is therefore always taken.

    Attributes:
        held: bytes of bodies that are held now.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._arriving: OrderedDict[asyncio.Timeout, int] = OrderedDict()  # bytes so far; the stalest first
        self.held = 0

    async def read(self, request: Request, most: int | None = None, encodings: tuple[str, ...] = ()) -> bytes:
        """The body as it was sent. `release` its length when it is no longer needed.

        Args:
            most: largest size in bytes; `body_bytes` of the limits by default.
            encodings: ways to compress it that whoever asks can undo.

        Raises:
            ApiError: it is compressed otherwise (415) or too large (413), it does not arrive in time or stands still
                while others wait (408), or there is no room (429).
            ClientDisconnect: the client left before its end.
        """
        if (encoding := content_encoding(request)) not in ("identity", *encodings):
            known = " or ".join([f"with {name}" for name in encodings[:1]] + ["as it is"])
            message = f"bodies with Content-Encoding: {encoding[:40]} are not read here; send it {known}"
            raise ApiError(415, message, code="content_encoding", extra={"Accept-Encoding": ", ".join(encodings[:1])})
        most = most or self._limits.body_bytes
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > most:
            raise _too_large(most)
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.body_seconds) as alarm:
                try:
                    self._arrived(alarm, 0)
                    async for chunk in request.stream():
                        self._arrived(alarm, len(chunk))
                        chunks.append(chunk)
                        if self._arriving[alarm] > most:
                            raise _too_large(most)
                except BaseException:
                    self.release(self._arriving.pop(alarm, 0))
                    raise
        except TimeoutError as error:
            raise ApiError(
                408,
                f"the body did not arrive within {self._limits.body_seconds:g} s, or stood still while others waited",
                code="body_timeout",
            ) from error
        self._arriving.pop(alarm, None)
        return b"".join(chunks)

    def hold(self, size: int) -> None:
        """Count this many more bytes as held, to be released as well. Raises ApiError (429) where there is no room."""
        if self.held + size > self._limits.held_bytes:
            raise _no_room()
        self.held += size

    def release(self, size: int) -> None:
        """Count this many bytes as no longer held."""
        self.held -= size

    def _arrived(self, alarm: asyncio.Timeout, size: int) -> None:
        """Count a piece of a body, giving up the stalest ones until there is room for it."""
        self._arriving[alarm] = self._arriving.get(alarm, 0) + size
        self._arriving.move_to_end(alarm)
        self.held += size
        while len(self._arriving) > self._limits.arriving or self.held > self._limits.held_bytes:
            stalest, held = self._arriving.popitem(last=False)
            self.release(held)
            if stalest is alarm:  # what is held is being read already
                raise _no_room()
            stalest.reschedule(asyncio.get_running_loop().time())


GZIP = ("gzip", "x-gzip")
_FREE, _MOST_RATIO = 2**20, 100  # bytes of an inflated body, and more for each byte that was sent


def content_encoding(request: Request) -> str:
    """How a request's body is compressed; identity where it is not."""
    return request.headers.get("content-encoding", "identity").strip().lower()


def inflated(body: bytes, most: int) -> bytes:
    """A body that gzip compressed. No more than one byte over `most` is ever made of it, nor over 100 times its size: a
    small body must not cost what a large one does, and encoded images hardly become smaller.

    Raises:
        ApiError: it is not gzip's (400), or larger than that (413).
    """
    most = min(most, _FREE + _MOST_RATIO * len(body))
    made, rest = b"", body
    while rest:
        member = zlib.decompressobj(wbits=31)
        try:
            made += member.decompress(rest, most + 1 - len(made))
        except zlib.error as error:
            raise bad_request(f"the body is not what gzip writes ({error})", code="invalid_gzip") from error
        if len(made) > most:
            raise _too_large(most)
        if not member.eof:
            raise bad_request("the body ends before gzip's end", code="invalid_gzip")
        rest = member.unused_data
    return made


def _no_room() -> ApiError:
    return ApiError(429, "too many large requests at once; try again", code="bodies_full", retry_after=2)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is over the limit of {most:,} bytes; send less or smaller images", code="too_large")


class FairQueue(Generic[T]):
    """What waits, by client. Clients have their turns one after the other, however much one of them sends."""

    def __init__(self):
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()  # the next client first

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[T]:
        return iter([item for items in self._waiting.values() for item in items])

    def put(self, client: str, item: T) -> None:
        """Add the newest of a client."""
        self._waiting.setdefault(client, deque()).append(item)

    def take(self, rank: Callable[[str], float] = lambda client: 0.0) -> T | None:
        """The oldest of the client of least rank; of equals, of the one whose turn it is. None where nothing waits.

        Args:
            rank: of a client; one whose rank is infinite is passed over.
        """
        client = min(self._waiting, key=rank, default=None)
        if client is None or rank(client) == math.inf:
            return None
        items = self._waiting.pop(client)
        item = items.popleft()
        if items:
            self._waiting[client] = items  # behind all others
        return item

    def give_way(self, client: str) -> T | None:
        """Take out the newest of the client that has most, for a newcomer; None where the newcomer has as many."""
        longest = max(self._waiting, key=lambda other: len(self._waiting[other]), default=None)
        if longest is None or len(self._waiting[longest]) <= len(self._waiting.get(client, ())) + 1:
            return None
        return self._waiting[longest].pop()

    def drop(self, over: Callable[[T], bool]) -> None:
        """Take out what need not wait any more."""
        kept = {client: deque(i for i in items if not over(i)) for client, items in self._waiting.items()}
        self._waiting = OrderedDict((client, items) for client, items in kept.items() if items)


class Readers:
    """Threads that read requests: one client after the other has its turn, however many requests one of them sends.

    Args:
        threads: how many read at once.
        name: of the threads.
    """

    def __init__(self, threads: int, name: str):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: FairQueue[tuple[Future, Callable]] = FairQueue()

    async def run(self, client: str, work: Callable[..., T], *args: Any) -> T:
        """The result of `work(*args)` in a thread. Work that has not begun is dropped when this is cancelled."""
        result: Future[T] = Future()
        with self._lock:
            self._waiting.put(client, (result, partial(work, *args)))
        self._pool.submit(self._take_turn)
        return await asyncio.wrap_future(result)

    def _take_turn(self) -> None:
        """Run one piece of the work that waits, of the client whose turn it is."""
        with self._lock:
            result, work = self._waiting.take()
        if not result.set_running_or_notify_cancel():
            return
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)
