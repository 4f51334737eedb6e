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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' allocators have no such call")
def test_what_a_large_request_freed_goes_back_to_the_system():
    async def serve() -> tuple[int, int, int]:
        freed, before = FreedMemory(), runtime._resident()
        held = took(300)
        last = bytearray(64 * 1024)  # behind them on the heap, so that they are not its end
        most = runtime._resident()
        del held
        for _ in range(3):  # however many requests end, it is looked at once
            freed.give_back_soon()
        await asyncio.sleep(1.5)
        return before, most, runtime._resident() + 0 * len(last)

    before, most, after = asyncio.run(serve())
    assert most - before > 150 * MB  # less than was asked for: some was free before
    assert after - before < 64 * MB


def test_little_growth_is_left_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(runtime, "release_freed", lambda: calls.append(1))
    sizes = iter([1000 * MB, 1050 * MB, 1100 * MB, 1040 * MB, 1060 * MB])
    monkeypatch.setattr(runtime, "_resident", lambda: next(sizes))
    freed = FreedMemory()
    freed._give_back()
    assert not calls
    freed._give_back()  # 100 MB more: given back, and 1040 is what it grows from now
    freed._give_back()
    assert len(calls) == 1
