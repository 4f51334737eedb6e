"""The lock of a run: one holder at a time, and none that is dead keeps it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from workflows.errors import WorkflowError
from workflows.runtime import stop_on_sigterm
from workflows.storage import lock as leases
from workflows.storage.lock import Holder, Lease

HOLD = """
import sys, time
from pathlib import Path
from workflows.storage.lock import Lease
with Lease(Path(sys.argv[1]), "recipe tiny"):
    print("held", flush=True)
    time.sleep(600)
"""

NOBODY = 2**22 + 5
"""A number that no process has."""


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "run" / "lock.json"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.1)
    monkeypatch.setattr(leases, "PATIENCE", 1.0)


def write(lock, beat: int = 0, **fields) -> None:
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps({"beat": beat, **asdict(Holder("recipe tiny")), **fields}))


def test_a_second_holder_is_refused_by_name_and_the_lock_goes_with_the_block(lock):
    with (
        Lease(lock, "recipe tiny"),
        pytest.raises(WorkflowError, match=rf"recipe tiny is under way already \(.*process {os.getpid()}"),
        Lease(lock, "recipe tiny"),
    ):
        pass
    assert list(lock.parent.iterdir()) == []
    with Lease(lock, "recipe tiny"):
        assert lock.exists()


def test_a_killed_holder_keeps_nothing(lock):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(WorkflowError, match="under way already"), Lease(lock, "recipe tiny"):
        pass
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie until its parent looks
    assert lock.exists()
    with Lease(lock, "recipe tiny"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    process.communicate()


@pytest.mark.parametrize("attempt", range(10))
def test_of_many_that_find_a_dead_holders_lock_one_gets_it(lock, quick, attempt):
    write(lock, token="dead", pid=NOBODY)
    got, start, refused = [], threading.Barrier(8), threading.Semaphore(0)

    def come():
        start.wait()
        try:
            with Lease(lock, "recipe tiny"):
                got.append(1)
                assert all(refused.acquire(timeout=10) for _ in range(7))
        except WorkflowError:
            refused.release()

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [1]
    assert list(lock.parent.iterdir()) == []


def test_who_comes_late_to_a_dead_holders_lock_leaves_its_heir_alone(lock, monkeypatch):
    write(lock, token="dead", pid=NOBODY)
    heir, late = Lease(lock, "the heir"), Lease(lock, "the late one")
    looks = late._lives

    def slow(file, beat, holder):
        alive = looks(file, beat, holder)
        if holder.token == "dead":
            heir.__enter__()  # while the late one still takes the lock for a dead holder's
        return alive

    monkeypatch.setattr(late, "_lives", slow)
    with pytest.raises(WorkflowError, match="the heir is under way already"), late:
        pass
    assert json.loads(lock.read_text())["purpose"] == "the heir"
    heir.__exit__(None, None, None)
    assert list(lock.parent.iterdir()) == []


def test_an_heir_that_was_killed_blocks_nobody(lock):
    write(lock, token="dead", pid=NOBODY)
    write(lock.with_name("lock.json.dead"), token="heir", pid=NOBODY)
    with Lease(lock, "recipe tiny"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    write(lock.with_name("lock.json.dead"), token="heir", pid=NOBODY)  # killed after it had replaced the lock
    with Lease(lock, "recipe tiny"):
        pass
    assert list(lock.parent.iterdir()) == []


def test_a_holder_on_another_machine_counts_as_gone_when_its_number_stands(lock, quick):
    write(lock, machine="elsewhere", host="elsewhere")
    notes = []
    with Lease(lock, "recipe tiny", notes.append):
        assert json.loads(lock.read_text())["machine"] != "elsewhere"
    assert "looking whether it still runs" in notes[0]


def test_a_holder_on_another_machine_whose_number_grows_is_respected(lock, quick):
    write(lock, machine="elsewhere", host="elsewhere")
    over = threading.Event()

    def live():
        beat = 0
        while not over.wait(0.2):
            beat += 1
            beside = lock.with_name("beside")
            content = json.loads(lock.read_text()) | {"beat": beat}
            beside.write_text(json.dumps(content))
            os.replace(beside, lock)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(WorkflowError, match="@elsewhere, process"), Lease(lock, "recipe tiny"):
            pass
    finally:
        over.set()
        thread.join()


def test_waiting_takes_the_lock_when_it_is_free(lock, quick):
    order, notes = [], []

    def first():
        with Lease(lock, "preparation of x"):
            order.append("first")
            held.set()
            time.sleep(0.5)
            order.append("first is done")

    held = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with Lease(lock, "preparation of x", notes.append, wait=True):
        order.append("second")
    thread.join()
    assert order == ["first", "first is done", "second"]
    assert len(notes) == 1
    assert "waiting for it" in notes[0]


def test_a_holder_that_lost_its_lock_stops_and_says_so(lock, quick):
    before = signal.getsignal(signal.SIGTERM)
    stop_on_sigterm()
    try:
        with pytest.raises(WorkflowError, match="took over"):
            lose(lock)
        assert json.loads(lock.read_text())["token"] == "another"  # it is not ours to take away
    finally:
        signal.signal(signal.SIGTERM, before)


def lose(lock) -> None:
    """Hold a lock that another takes over, and go on working until stopped."""
    with Lease(lock, "recipe tiny"):
        write(lock, token="another", machine="elsewhere")
        time.sleep(30)


def test_something_else_in_its_place_is_not_deleted(lock, quick):
    lock.parent.mkdir()
    lock.write_text("mine")
    with pytest.raises(WorkflowError, match="not a lock that this version wrote"), Lease(lock, "recipe tiny"):
        pass
    assert lock.read_text() == "mine"
