"""The watcher of an alias: what it does with answers, silence and a wake-up call."""

import threading
import time

import pytest

from tests.helpers.processes import wait_for
from workflows.errors import WorkflowError
from workflows.serve.alias import AliasWatcher


class Registry:
    """An alias that can be moved and a registry that can go away."""

    def __init__(self):
        self.version, self.away, self.asked = "1", False, 0
        self.offered: list[str] = []
        self.event = threading.Event()

    def look(self):
        self.asked += 1
        if self.away:
            raise WorkflowError("the registry does not answer")
        return self.version

    def offer(self, version):
        self.offered.append(version)
        self.event.set()

    def wait_for(self, version, seconds=20):
        deadline = time.monotonic() + seconds
        while version not in self.offered:
            assert time.monotonic() < deadline, self.offered
            time.sleep(0.01)


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def watch(registry):
    started = []

    def start(**options):
        watcher = AliasWatcher(registry.look, registry.offer, **options)
        started.append(watcher)
        watcher.start()
        return watcher

    yield start
    for watcher in started:
        watcher.stop()


def test_every_look_is_offered_and_a_move_is_seen(registry, watch):
    watch(poll_seconds=0.01)
    registry.wait_for("1")
    registry.version = "2"
    registry.wait_for("2")


def test_waking_looks_at_once_and_a_touched_file_soon(registry, watch, tmp_path):
    watcher = watch(poll_seconds=3600, signal=tmp_path / "serving" / "look")
    registry.wait_for("1")
    registry.version = "2"
    watcher.wake()
    registry.wait_for("2")
    registry.version = "3"
    other = AliasWatcher(registry.look, registry.offer, signal=tmp_path / "serving" / "look")
    other.tell_others()
    registry.wait_for("3")


def test_a_registry_that_is_away_is_asked_less_and_less_and_changes_nothing(registry, watch):
    registry.away = True
    watcher = watch(poll_seconds=0.01, jitter=0)
    deadline = time.monotonic() + 20
    while watcher.failures < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert registry.offered == []
    assert watcher.pause() >= 0.01 * 2**4
    registry.away = False
    registry.wait_for("1")
    wait_for(lambda: watcher.failures == 0)  # counted after the offer has returned


def test_pauses_vary_by_the_jitter_and_have_a_bound(registry):
    watcher = AliasWatcher(registry.look, registry.offer, poll_seconds=10, jitter=0.2)
    pauses = [watcher.pause() for _ in range(200)]
    assert 8 <= min(pauses) < 9 < 11 < max(pauses) <= 12
    watcher.failures = 50
    assert watcher.pause() <= 60 * 1.2


def test_an_alias_that_is_gone_offers_nothing_and_a_fault_does_not_end_the_watching(registry, watch):
    registry.version = None
    watcher = watch(poll_seconds=0.01)
    while registry.asked < 3:
        time.sleep(0.01)
    assert registry.offered == []

    def fault(version):
        watcher._offer = registry.offer
        raise RuntimeError("a fault")

    watcher._offer = fault
    registry.version = "2"
    registry.wait_for("2")
