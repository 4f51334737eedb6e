"""Freed memory goes back to the system soon after the request that needed it."""

import asyncio
import sys

import pytest

from workflows import runtime
from workflows.runtime import FreedMemory

MB = 2**20


def took(megabytes: int) -> list[bytearray]:
    """Memory in pieces too small for the C library to map each, and touched."""
    return [bytearray(64 * 1024) for _ in range(megabytes * 16)]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems' allocators have no such call")


async def let_go(freed: FreedMemory, held: list) -> None:
    """A request ends, and those beside it; two seconds later it is looked, however many they were."""
    held.clear()
    for _ in range(3):
        freed.give_back_soon()
    await asyncio.sleep(2.5)


def test_what_large_requests_freed_goes_back_to_the_system():
    async def serve() -> list[int]:
        runtime.release_freed()  # what other tests left free would be taken first
        freed, sizes = FreedMemory(), [runtime._resident()]
        first, second = took(200), took(200)
        last = bytearray(64 * 1024)  # behind them on the heap, so that they are not its end
        sizes.append(runtime._resident())
        await let_go(freed, first)  # the second request is still at work
        sizes.append(runtime._resident())
        await let_go(freed, second)
        return [*sizes, runtime._resident() + 0 * len(last)]

    before, most, one, after = asyncio.run(serve())
    assert most - before > 150 * MB
    assert one < most - 50 * MB
    assert after < one - 50 * MB


def test_little_growth_is_left_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(runtime, "release_freed", lambda: calls.append(1))
    sizes = iter([1000 * MB, 1031 * MB, 1032 * MB])
    monkeypatch.setattr(runtime, "_resident", lambda: next(sizes))
    freed = FreedMemory()
    freed._give_back()
    assert not calls
    freed._give_back()
    assert len(calls) == 1
