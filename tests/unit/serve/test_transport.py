"""Streams below the routes: what is sent, and who is told when nobody reads it."""

import asyncio
import json

import pytest

from workflows.serve.openai import ApiError
from workflows.serve.sampling import Delta, TokenLogprob
from workflows.serve.service import Events
from workflows.serve.transport import EventStream


def stream(events, fail_at=None, leaves=False):
    """What an EventStream sends, and how often its end was told. `fail_at`: the message that cannot be sent."""
    sent, ended = [], []

    async def send(message):
        if len(sent) == fail_at:
            raise OSError("gone")
        sent.append(message)

    async def receive():
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    response = EventStream(events, {"x-a": "b"}, lambda: ended.append(1))
    asyncio.run(response({"type": "http"}, receive, send))
    return sent, len(ended)


async def three(closed):
    try:
        for number in range(3):
            yield {"n": number} if number != 1 else None
    finally:
        closed.append(1)


def test_events_comments_and_the_end():
    sent, ended = stream(three(closed := []))
    assert (sent[0]["status"], dict(sent[0]["headers"])[b"content-type"]) == (200, b"text/event-stream; charset=utf-8")
    assert dict(sent[0]["headers"])[b"x-a"] == b"b"
    bodies = [message["body"] for message in sent[1:]]
    assert bodies == [b'data: {"n":0}\n\n', b": waiting\n\n", b'data: {"n":2}\n\n', b"data: [DONE]\n\n", b""]
    assert [message["more_body"] for message in sent[1:]] == [True] * 4 + [False]
    assert (ended, closed) == (1, [1])


def test_an_error_is_the_last_event():
    async def failing():
        yield {"n": 0}
        raise ApiError(504, "too long", code="deadline_exceeded")

    sent, _ = stream(failing())
    assert json.loads(sent[2]["body"].removeprefix(b"data: "))["error"]["code"] == "deadline_exceeded"
    assert sent[3]["body"] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_the_end_is_told_wherever_the_client_leaves(fail_at):
    """Also before the first event is asked for, where the generator's own `finally` never runs."""
    closed = []
    assert stream(three(closed), fail_at=fail_at)[1] == 1
    assert closed == ([1] if fail_at else [])


def test_a_client_that_has_left_already():
    async def endless():
        while True:
            await asyncio.sleep(0.01)
            yield {"n": 0}

    assert stream(endless(), leaves=True)[1] == 1


def test_pieces_that_wait_together_become_one():
    report = TokenLogprob(b"a", -1.0)

    async def get():
        events = Events()
        events.put(0, Delta("a", (report,)))
        events.put(0, Delta("b"))
        events.put(1, Delta("x"))
        events.put(0, Delta("c"))
        events.put(0, None)
        events.put(0, Delta("d", (report,)))
        found = [await events.get() for _ in range(5)]
        late = asyncio.ensure_future(events.get())
        await asyncio.sleep(0)
        events.put(2, None)
        return [*found, await late]

    found = asyncio.run(get())
    assert found[:3] == [(0, Delta("ab", (report,))), (1, Delta("x")), (0, Delta("c"))]
    assert found[3:] == [(0, None), (0, Delta("d", (report,))), (2, None)]
