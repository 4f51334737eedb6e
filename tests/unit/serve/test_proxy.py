"""The limit on one client's requests at once, as Ray Serve's proxy runs it."""

import asyncio
import json

import pytest

from workflows.serve.proxy import MOST, MOST_VARIABLE, AtOnce, middlewares, requests_at_once


class Held:
    """An application that answers when it is let, or fails."""

    def __init__(self):
        self.seen, self._let = 0, asyncio.Event()

    def let(self) -> None:
        self._let.set()

    async def __call__(self, scope, receive, send) -> None:
        self.seen += 1
        await self._let.wait()
        if scope["path"] == "/fails":
            raise RuntimeError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


async def ask(app, path="/v1/chat/completions", key=b"one", address="10.0.0.1") -> tuple[int, bytes]:
    sent = []

    async def send(message) -> None:
        sent.append(message)

    headers = [(b"authorization", b"Bearer " + key)] if key else []
    await app({"type": "http", "path": path, "client": (address, 5000), "headers": headers}, None, send)
    return sent[0]["status"], sent[1]["body"]


async def _fill() -> None:
    held = Held()
    app = AtOnce(held, most=3)
    waiting = [asyncio.ensure_future(ask(app)) for _ in range(3)]
    await asyncio.sleep(0)
    refused, body = await ask(app)
    error = json.loads(body)["error"]
    assert (refused, error["type"], error["code"]) == (429, "rate_limit_error", "too_many_at_once")
    assert error["message"].startswith("3 requests of yours are under way")
    others = [ask(app, key=b"two"), ask(app, key=b""), ask(app, address="10.0.0.2")]
    always = [ask(app, path=path) for path in ("/healthz", "/health", "/llm/readyz")]
    more = [asyncio.ensure_future(one) for one in others + always]
    await asyncio.sleep(0)
    assert held.seen == 9
    held.let()
    assert {status for status, _ in await asyncio.gather(*waiting, *more)} == {200}
    assert (await ask(app))[0] == 200
    assert not app._under_way  # nobody is remembered


def test_one_client_is_refused_when_it_has_as_many_under_way_and_no_other_one():
    asyncio.run(_fill())


async def _leave() -> None:
    held = Held()
    app = AtOnce(held, most=1)
    left = asyncio.ensure_future(ask(app))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    held.let()
    with pytest.raises(RuntimeError):
        await ask(app, path="/fails")
    assert (await ask(app))[0] == 200


def test_a_request_that_is_given_up_or_fails_makes_room():
    asyncio.run(_leave())


@pytest.mark.parametrize(("given", "most"), [(None, MOST), ("", MOST), ("7", 7), ("0", 0)])
def test_the_environment_says_how_many(given, most, monkeypatch):
    monkeypatch.delenv(MOST_VARIABLE, raising=False)
    environment = {} if given is None else {MOST_VARIABLE: given}
    assert requests_at_once(environment) == most
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert [one.kwargs for one in middlewares()] == ([{"most": most}] if most else [])


@pytest.mark.parametrize("given", ["many", "-1", "0.5", "nan", "²", "9" * 30])
def test_what_is_no_number_is_named(given):
    with pytest.raises(ValueError, match=f"MLMAMBA_REQUESTS_AT_ONCE = {given}: give the requests of one client"):
        requests_at_once({MOST_VARIABLE: given})
