"""No client keeps the others waiting: bodies that stand still, and one that sends a hundred requests."""

import asyncio
import gzip
import math
import random
import threading

import pytest
from fastapi import Request
from starlette.requests import ClientDisconnect

from workflows.serve.intake import Bodies, FairQueue, Readers, inflated
from workflows.serve.openai import ApiError
from workflows.serve.options import Limits


class Sender:
    """A request whose body comes piece by piece, when it is told to."""

    def __init__(self, length=None):
        headers = [] if length is None else [(b"content-length", str(length).encode())]
        self._pieces = asyncio.Queue()
        self.request = Request({"type": "http", "method": "POST", "headers": headers}, self._pieces.get)

    def send(self, body, more=True):
        self._pieces.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self):
        self._pieces.put_nowait({"type": "http.disconnect"})


def reading(bodies, *first, **kwargs):
    sender = Sender()
    for piece in first:
        sender.send(piece)
    return sender, asyncio.ensure_future(bodies.read(sender.request, **kwargs))


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def run(story):
    asyncio.run(story())


def test_a_body_is_read_and_counted_until_it_is_released():
    async def story():
        bodies = Bodies(Limits())
        sender, body = reading(bodies, b"ab", b"cd")
        sender.send(b"e", more=False)
        assert await body == b"abcde"
        assert bodies.held == 5
        bodies.release(5)
        assert bodies.held == 0

    run(story)


def test_of_too_many_half_sent_bodies_those_that_stand_still_are_given_up():
    async def story():
        bodies = Bodies(Limits(arriving=20, body_seconds=60))
        stalled = [reading(bodies, b"x" * 100) for _ in range(140)]
        await settle()
        for number in range(30):  # good clients come and go meanwhile
            sender, body = reading(bodies)
            sender.send(b"good", more=False)
            assert await body == b"good"
            bodies.release(4)
            assert bodies.held <= 20 * 100, number
        ended = [body for _, body in stalled if body.done()]
        assert len(ended) >= 120
        for body in ended:
            assert (body.exception().status, body.exception().code) == (408, "body_timeout")
        for sender, _ in stalled:
            sender.leave()
        await asyncio.wait([body for _, body in stalled])
        assert bodies.held == 0

    run(story)


def test_progress_keeps_a_slow_body():
    async def story():
        bodies = Bodies(Limits(arriving=3))
        slow, body = reading(bodies, b"a")
        for _ in range(20):
            reading(bodies, b"x")
            await settle()
            slow.send(b"b")
            await settle()
        slow.send(b"c", more=False)
        assert await body == b"a" + b"b" * 20 + b"c"

    run(story)


def test_bytes_of_all_bodies_are_limited():
    async def story():
        bodies = Bodies(Limits(held_bytes=1000))
        _, stalled = reading(bodies, b"x" * 900)
        await settle()
        sender, body = reading(bodies)
        sender.send(b"y" * 900, more=False)
        assert await body == b"y" * 900  # in the place of the one that stood still
        with pytest.raises(ApiError, match="did not arrive"):
            await stalled
        sender, third = reading(bodies)
        sender.send(b"z" * 900, more=False)
        with pytest.raises(ApiError, match="too many large requests") as caught:  # the second is being answered
            await third
        assert (caught.value.status, caught.value.retry_after) == (429, 2)
        assert bodies.held == 900

    run(story)


def test_time_size_and_clients_that_leave():
    async def story():
        bodies = Bodies(Limits(body_seconds=0.05, body_bytes=1000))
        _, body = reading(bodies, b"x")
        with pytest.raises(ApiError, match=r"within 0\.05 s"):
            await body
        _, body = reading(bodies, b"x" * 600, b"x" * 600)
        with pytest.raises(ApiError, match="over the limit of 1,000 bytes"):
            await body
        _, body = reading(bodies, b"x" * 60, most=50)
        with pytest.raises(ApiError, match="over the limit of 50 bytes"):
            await body
        with pytest.raises(ApiError, match="over the limit of 1,000 bytes"):  # said before anything is read
            await bodies.read(Sender(1001).request)
        sender, body = reading(bodies, b"x")
        sender.leave()
        with pytest.raises(ClientDisconnect):
            await body
        assert bodies.held == 0

    run(story)


def test_clients_have_their_turns_one_after_the_other():
    order, opened = [], threading.Event()

    async def story():
        readers = Readers(1, "test")
        first = asyncio.ensure_future(readers.run("greedy", opened.wait))
        await asyncio.sleep(0.05)
        greedy = [asyncio.ensure_future(readers.run("greedy", order.append, f"greedy {n}")) for n in range(100)]
        await settle()
        good = [asyncio.ensure_future(readers.run(f"good {n}", order.append, f"good {n}")) for n in range(3)]
        await settle()
        opened.set()
        await asyncio.gather(first, *greedy, *good)

    run(story)
    assert order[:4] == ["greedy 0", "good 0", "good 1", "good 2"]
    assert order[4:] == [f"greedy {n}" for n in range(1, 100)]


def test_work_whose_client_has_left_is_not_begun_and_errors_reach_the_others():
    begun, opened = [], threading.Event()

    async def story():
        readers = Readers(2, "test")
        busy = [asyncio.ensure_future(readers.run("a", opened.wait)) for _ in range(2)]
        await asyncio.sleep(0.05)
        left = [asyncio.ensure_future(readers.run("b", begun.append, n)) for n in range(10)]
        wrong = asyncio.ensure_future(readers.run("c", int, "x"))
        await settle()
        for one in left:
            one.cancel()
        await settle()
        opened.set()
        await asyncio.gather(*busy)
        with pytest.raises(ValueError, match="invalid literal"):
            await wrong

    run(story)
    assert begun == []


def test_a_fair_queue():
    queue = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(item[0], item)
    assert len(queue) == 6
    assert [queue.take() for _ in range(3)] == ["a1", "b1", "c1"]
    assert queue.take(lambda client: {"a": 2, "b": 1}[client]) == "b2"
    assert queue.take(lambda client: math.inf) is None
    assert queue.give_way("a") is None
    assert queue.give_way("d") == "a3"
    assert queue.give_way("d") is None  # it would have as many
    queue.drop(lambda item: item == "a2")
    assert (len(queue), queue.take(), list(queue)) == (0, None, [])


def test_a_small_body_does_not_become_a_large_one():
    text = bytes(random.Random(0).choices(b"abcd", k=3_000_000))
    assert inflated(gzip.compress(text), 2**25) == text
    with pytest.raises(ApiError, match="over the limit of") as caught:
        inflated(gzip.compress(b" " * 20_000_000), 2**25)  # a thousand times its size
    assert caught.value.status == 413
