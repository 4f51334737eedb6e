"""The lock of a run: one holder at a time, and none that is dead keeps it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from workflows.errors import WorkflowError
from workflows.runtime import stop_on_sigterm
from workflows.storage import claims
from workflows.storage.claims import Holder
from workflows.storage.lock import _StoreLock, lock

HOLD = """
import sys, time
from pathlib import Path
from workflows.storage.lock import _StoreLock, lock
with lock(Path(sys.argv[1]), "recipe tiny"):
    print("held", flush=True)
    time.sleep(600)
"""

NOBODY = 2**22 + 5
"""A number that no process has."""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / "lock.json"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.1)
    monkeypatch.setattr(claims, "PATIENCE", 1.0)


@pytest.fixture(params=["exchange", "no-exchange"])
def disk(request, monkeypatch):
    """A file system that can exchange two files, and one that cannot, as NFS: there the takeover is our own."""
    if request.param == "no-exchange":
        monkeypatch.setattr("filelock._soft._exclusive._recovery.exchange_names", lambda source, target: False)


def write(file, **fields) -> None:
    """Put a holder's lock and name there, in another's place if there is one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    holder = Holder("recipe tiny", **fields)
    record = {"pid": holder.pid, "host": holder.host, "mode": "lease", "token": holder.token}
    lines = ["filelock/2", *(f"{key}={value}" for key, value in record.items()), f"duration={claims.PATIENCE!r}", ""]
    for target, text in ((file.with_name("lock.json.holder"), json.dumps(asdict(holder))), (file, "\n".join(lines))):
        beside = file.with_name("beside")
        beside.write_text(text)
        os.replace(beside, target)


def process_of(file) -> int:
    return int(re.search(r"^pid=(\d+)$", file.read_text(), re.MULTILINE)[1])


def start_holder(file) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_holder_is_refused_by_name_and_the_lock_goes_with_the_block(file):
    refused = pytest.raises(
        WorkflowError, match=rf"recipe tiny is under way already \(.+@.+, process {os.getpid()}; {file}\): wait for it"
    )
    with lock(file, "recipe tiny"), refused, lock(str(file), "recipe tiny"):
        pass
    assert list(file.parent.iterdir()) == []
    with lock(f"file://{file}", "recipe tiny"):
        assert file.exists()


def test_a_killed_holder_keeps_nothing(file, disk):
    process = start_holder(file)
    with pytest.raises(WorkflowError, match="under way already"), lock(file, "recipe tiny"):
        pass
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie until its parent looks
    assert file.exists()
    began = time.monotonic()
    with lock(file, "recipe tiny"):
        assert process_of(file) == os.getpid()
    process.communicate()
    assert time.monotonic() - began < claims.PATIENCE / 4


def test_a_suspended_holder_on_this_machine_keeps_its_lock(file, quick):
    process = start_holder(file)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(WorkflowError, match=f"process {process.pid}"), lock(file, "recipe tiny"):
        pass
    process.kill()
    process.communicate()
    with lock(file, "recipe tiny"):
        assert process_of(file) == os.getpid()
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("attempt", range(10))
def test_of_many_that_find_a_dead_holders_lock_one_gets_it(file, quick, disk, attempt):
    write(file, token="dead", pid=NOBODY)
    got, start, refused = [], threading.Barrier(8), threading.Semaphore(0)

    def come():
        start.wait()
        try:
            with lock(file, "recipe tiny"):
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
    assert list(file.parent.iterdir()) == []


def test_who_comes_late_to_a_dead_holders_lock_leaves_its_heir_alone(file, disk, monkeypatch):
    write(file, token="dead", pid=NOBODY)
    heir, look = lock(file, "the heir"), claims.living

    def slow(seen, *others):
        alive = look(seen, *others)
        if "dead" in seen:
            monkeypatch.undo()
            heir.__enter__()  # while the late one still takes the lock for a dead holder's
        return alive

    monkeypatch.setattr(claims, "living", slow)
    with pytest.raises(WorkflowError, match="the heir is under way already"), lock(file, "the late one"):
        pass
    assert json.loads(file.with_name("lock.json.holder").read_text())["purpose"] == "the heir"
    heir.__exit__(None, None, None)
    assert list(file.parent.iterdir()) == []


def test_a_contender_that_was_killed_blocks_nobody(file, disk):
    write(file, token="dead", pid=NOBODY)
    file.rename(file.with_name(f"lock.json.break.{NOBODY}.{'0' * 32}"))  # put aside by the contender, which then died
    write(file, token="heir", pid=NOBODY)
    file.with_name("lock.json.takeover").touch()
    with lock(file, "recipe tiny"):
        assert process_of(file) == os.getpid()
    assert list(file.parent.iterdir()) == []


def test_a_holder_on_another_machine_counts_as_gone_when_its_beat_stands(file, quick, disk):
    write(file, machine="elsewhere", host="elsewhere")
    notes = []
    with lock(file, "recipe tiny", notes.append):
        assert process_of(file) == os.getpid()
    assert "looking whether it still runs" in notes[0]


def test_a_holder_on_another_machine_whose_beat_goes_on_is_respected(file, quick):
    write(file, machine="elsewhere", host="elsewhere")
    over = threading.Event()

    def live():
        while not over.wait(0.2):
            os.utime(file)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(WorkflowError, match="@elsewhere, process"), lock(file, "recipe tiny"):
            pass
    finally:
        over.set()
        thread.join()


def test_a_holder_that_was_killed_before_it_wrote_its_name_keeps_nothing(file, quick, disk):
    write(file, token="dead", pid=NOBODY, host="elsewhere")
    file.with_name("lock.json.holder").unlink()
    notes = []
    with lock(file, "recipe tiny", notes.append):
        assert process_of(file) == os.getpid()
    assert f"elsewhere, process {NOBODY}" in notes[0]


def test_waiting_takes_the_lock_when_it_is_free(file, quick):
    order, notes = [], []

    def first():
        with lock(file, "preparation of x"):
            order.append("first")
            held.set()
            time.sleep(0.5)
            order.append("first is done")

    held = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with lock(file, "preparation of x", notes.append, wait=True):
        order.append("second")
    thread.join()
    assert order == ["first", "first is done", "second"]
    assert len(notes) == 1
    assert "waiting for it" in notes[0]


def test_a_holder_that_lost_its_lock_stops_and_says_so(file, quick):
    before = signal.getsignal(signal.SIGTERM)
    stop_on_sigterm()
    try:
        with pytest.raises(WorkflowError, match="took over"):
            lose(file)
        assert "token=another" in file.read_text()  # it is not ours to take away
        assert file.with_name("lock.json.holder").exists()
    finally:
        signal.signal(signal.SIGTERM, before)


def lose(file) -> None:
    """Hold a lock that another takes over, and go on working until stopped."""
    with lock(file, "recipe tiny"):
        write(file, token="another", machine="elsewhere")
        time.sleep(30)


@pytest.mark.parametrize(
    "text",
    ["mine", "", json.dumps({"beat": 3, **asdict(Holder("recipe tiny"))})],
    ids=["other", "empty", "version-0.1"],
)
def test_something_else_in_its_place_is_named_and_not_deleted(file, quick, text):
    file.parent.mkdir()
    file.write_text(text)
    refused = pytest.raises(WorkflowError, match=f"{file} is not a lock that this version wrote .* delete it if")
    with refused, lock(file, "recipe tiny", wait=True):
        pass
    assert file.read_text() == text


HOLDER = asdict(Holder("recipe tiny"))


@pytest.mark.parametrize(
    "content",
    [
        *("5", "null", "[]", '"x"', "", "[" * 100_000, "\xff", json.dumps(HOLDER) + " " * (1 << 17)),
        *(json.dumps(HOLDER | {"pid": pid}) for pid in ("abc", -1, 0, None, True, 1.5, 1 << 80)),
        *(json.dumps(HOLDER | {"started": started}) for started in ("x", None, float("nan"), float("inf"))),
        *(json.dumps(HOLDER | {field: 5}) for field in ("purpose", "machine", "user", "job")),
        json.dumps({**HOLDER, "more": 1}),
    ],
)
def test_a_name_of_another_shape_beside_a_lock_is_not_believed(file, quick, content):
    write(file, token=HOLDER["token"], pid=NOBODY, host="elsewhere")
    file.with_name("lock.json.holder").write_bytes(content.encode("latin-1"))
    notes = []
    with lock(file, "recipe tiny", notes.append):
        assert process_of(file) == os.getpid()
    assert f"unknown@elsewhere, process {NOBODY}" in notes[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [("pid=", "pid=-"), ("pid=", "pid=abc"), ("pid=", "pid=9999999999"), ("mode=lease", "mode=exclusive")],
)
def test_a_lock_with_fields_that_we_never_write_is_named(file, quick, old, new):
    write(file, pid=NOBODY)
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(WorkflowError, match="is not a lock that this version wrote"), lock(file, "recipe tiny"):
        pass
    assert new in file.read_text()


@pytest.mark.parametrize("name", ["lock.json", "lock.json.holder", "lock.json.takeover"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_pipe_in_a_locks_place_is_named(file, quick, name, make):
    write(file, token="dead", pid=NOBODY)
    file.with_name(name).unlink(missing_ok=True)
    make(file.with_name(name))
    with pytest.raises(WorkflowError, match=rf"{name} is not a .*: delete it if"), lock(file, "recipe tiny"):
        pass
    assert file.with_name(name).exists()


def test_a_holders_names_reach_the_terminal_as_text(file, quick):
    write(file, user="\x1b[2Jroot", job="a\nb")
    with pytest.raises(WorkflowError) as told, lock(file, "recipe tiny"):
        pass
    assert r"\x1b[2Jroot" in str(told.value)
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    "content",
    [
        *("5", "null", "[", "[" * 100_000, json.dumps({"beat": 1, "held": True, **HOLDER}) + " " * (1 << 21)),
        *(json.dumps({"beat": 1, "held": True, **HOLDER} | change) for change in ({"pid": "abc"}, {"pid": -1})),
        *(json.dumps({"beat": 1, "held": True, **HOLDER} | change) for change in ({"held": "no"}, {"beat": None})),
    ],
)
def test_a_claim_of_another_shape_in_a_store_is_named(tmp_path, quick, content, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "a\x1b.json").write_text(content)
    held = _StoreLock(str(tmp_path), Holder("recipe tiny"), print)
    try:
        with pytest.raises(WorkflowError, match=r"a\\x1b\.json is not a lock that this version wrote"):
            held.take()
    finally:
        held.release()
    assert [path.name for path in tmp_path.iterdir()] == ["a\x1b.json"]
