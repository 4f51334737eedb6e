"""The desk between driver and workers, called as Ray would call it, and imports without what workers do not use."""

import asyncio
import gc
import subprocess
import sys
from importlib import import_module

import pytest

from workflows.train.entry import Desk, lean_imports

JOB = b"a job"


@pytest.fixture
def desk():
    """The actor's class without its process; its methods are coroutines."""
    return Desk.__ray_metadata__.modified_class()


async def soon(waiting):
    """What a call gives, or None when it is still waiting."""
    task = asyncio.ensure_future(waiting)
    done, _ = await asyncio.wait({task}, timeout=0.05)
    task.cancel()
    return task.result() if done else None


def test_a_job_is_finished_when_all_workers_of_a_group_have_finished_it(desk):
    async def story():
        assert await soon(desk.next(0)) is None
        await desk.give(JOB)
        assert await soon(desk.next(0)) == (1, JOB)
        await desk.finish(1, "group", 1, 2, {"rank": 1})
        assert (await desk.take(0.01))[1] is None
        await desk.finish(1, "group", 0, 2, {"rank": 0})
        assert (await desk.take(0.01))[1] == {"rank": 0}
        assert await soon(desk.next(1)) is None
        await desk.give(None)
        assert await soon(desk.next(1)) == (2, None)

    asyncio.run(story())


def test_what_one_worker_failed_at_is_the_outcome(desk):
    async def story():
        await desk.give(JOB)
        await desk.finish(1, "group", 0, 2, {})
        await desk.finish(1, "group", 1, 2, {"failed": "why"})
        assert (await desk.take(0.01))[1] == {"failed": "why"}

    asyncio.run(story())


def test_a_group_that_follows_one_that_died_does_the_whole_job_itself(desk):
    """Half of a group had finished when the other half was killed."""

    async def story():
        await desk.give(JOB)
        await desk.finish(1, "killed", 0, 2, {"by": "killed"})
        assert await soon(desk.next(0)) == (1, JOB)
        await desk.finish(1, "next", 1, 2, {"by": "next"})
        assert (await desk.take(0.01))[1] is None
        await desk.finish(1, "next", 0, 2, {"by": "next"})
        assert (await desk.take(0.01))[1] == {"by": "next"}
        await desk.give(JOB)
        await desk.finish(1, "late", 0, 1, {"by": "one believed dead"})
        assert (await desk.take(0.01))[1] is None

    asyncio.run(story())


def test_events_are_given_once_and_in_order(desk):
    async def story():
        await desk.give(JOB)
        await desk.add({"event": "one"})
        await desk.add({"event": "two"})
        assert [event["event"] for event in (await desk.take(1))[0]] == ["one", "two"]
        assert await desk.take(0.01) == ([], None)

    asyncio.run(story())


def test_collecting_garbage_goes_on_after_lean_imports():
    assert gc.isenabled()
    with lean_imports():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_import_that_fails_leaves_nothing_turned_off():
    with pytest.raises(ModuleNotFoundError), lean_imports():
        import_module("nowhere_to_be_found")
    assert gc.isenabled()
    assert "mlflow" not in sys.modules or sys.modules["mlflow"] is not None


def test_workers_load_deepspeed_without_what_they_do_not_use_and_can_load_that_later():
    program = """
import sys
from workflows.train.entry import lean_imports
with lean_imports():
    import workflows.train.loop
assert "deepspeed" in sys.modules
assert not {"mlflow", "scipy", "torch._inductor.compile_fx"} & sys.modules.keys()
import mlflow, scipy.stats, torch
assert mlflow.MlflowException and scipy.stats.bootstrap
assert torch.compile(lambda x: x + 1, backend="eager")(1) == 2
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
