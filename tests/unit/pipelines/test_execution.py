"""Ray that cannot be started or reached: an error that says so, and nothing left behind."""

import errno
import json
import socket

import pytest
import ray

from pipelines.execution import _MOST_PER_BLOCK, _attempt, _blocks, ensure_ray


@pytest.mark.parametrize("address", ["", "local"])
def test_a_ray_that_does_not_start_says_why(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null")  # no folder can be made in it
    said = []
    with pytest.raises(ConnectionError, match=r"Ray did not start: NotADirectoryError.*run again"):
        ensure_ray(say=said.append)
    assert said == ["starting Ray on this machine"]
    assert not ray.is_initialized()


def test_an_address_where_nothing_listens_is_named_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionError, match=f"no Ray cluster at RAY_ADDRESS = {address} .*refused.*unset it"):
        ensure_ray()


def test_a_host_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://no-such-host.invalid:10001")
    said = []
    with pytest.raises(ConnectionError, match=r"no Ray cluster at RAY_ADDRESS = ray://no-such-host.invalid:10001"):
        ensure_ray(say=said.append)
    assert said == ["connecting to the Ray cluster at ray://no-such-host.invalid:10001"]


def test_a_full_disk_inside_a_task_crosses_as_one_line():
    def full(task):
        with open("/dev/full", "w") as file:
            file.write("x" * task["size"])

    failed = _attempt(full, {"size": 100_000})["failed"]
    error = OSError(*failed)
    assert error.errno == errno.ENOSPC
    assert str(error) == f"[Errno 28] No space left on device on {socket.gethostname()}"
    assert _attempt(lambda task: task, {"a": 1}) == {"done": {"a": 1}}


def test_what_is_wrong_with_a_source_crosses_as_its_own_line():
    def broken(task):
        raise json.JSONDecodeError("Expecting value", "x", 0)

    assert _attempt(broken, {}) == {"wrong": "Expecting value: line 1 column 1 (char 0)"}


@pytest.mark.parametrize("cpus", [1, 2, 64])
@pytest.mark.parametrize("count", [0, 1, 7, 40, 1024])
def test_blocks_hold_every_task_once_and_get_smaller_towards_the_end(count, cpus):
    tasks = [{"number": number} for number in range(count)]
    blocks = list(_blocks(tasks, cpus))
    assert [task for block in blocks for task in block] == tasks
    sizes = [len(block) for block in blocks]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes, default=0) <= _MOST_PER_BLOCK
    for number, size in enumerate(sizes):  # one block is never so long that the others' CPUs could be done before it
        assert (size - 1) * cpus < sum(sizes[number:])
    if count >= cpus > 1:
        assert sizes[-cpus:] == [1] * min(cpus, count)
