"""The protocol of claims, on a table in memory: who wins, who steps back, who counts as alive."""

import threading
import time

import pytest

from workflows.storage import claims
from workflows.storage.claims import Holder, Seen, living, win


class Table:
    """Claims of one contender in a table that all share."""

    def __init__(self, table: dict[str, bool], name: str):
        self.table, self.name = table, name

    def write(self) -> None:
        self.table[self.name] = False

    def others(self) -> list[tuple[str, bool]]:
        time.sleep(0.001)  # where the others write
        return [(name, won) for name, won in list(self.table.items()) if name != self.name]

    def withdraw(self) -> None:
        del self.table[self.name]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.02)
    monkeypatch.setattr(claims, "PATIENCE", 0.2)


def test_two_never_win_together_and_all_win_in_the_end():
    table, inside, most, start = {}, [], [], threading.Barrier(4)

    def come(name):
        own = Table(table, name)
        start.wait()
        assert win(own, 0.01, 30) is None
        inside.append(name)
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(name)
        own.withdraw()

    threads = [threading.Thread(target=come, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
    assert table == {}


def test_a_claim_that_has_won_is_named_at_once_and_another_after_the_wait():
    table = {"other": False, "winner": True}
    assert win(Table(table, "own"), 0.01, 60) == "winner"
    del table["winner"]
    assert win(Table(table, "own"), 0.01, 0.05) == "other"
    assert table == {"other": False}


def test_a_holder_elsewhere_lives_while_its_beat_changes_and_one_here_while_its_process_runs(quick):
    far = {"machine": "far", "host": "far"}
    seen = {
        "here": Seen(1, True, Holder("x")),
        "gone": Seen(1, True, Holder("x", pid=2**22 + 5)),
        "reused": Seen(1, True, Holder("x", started=1.0)),  # the process number is another's by now
        "beats": Seen(1, True, Holder("x", **far)),
        "stands": Seen(1, True, Holder("x", **far)),
        "leaves": Seen(1, True, Holder("x", **far)),
    }
    notes = []
    now = {"beats": seen["beats"]._replace(beat=2), "stands": seen["stands"]}
    assert living(seen, lambda: now, notes.append).keys() == {"here", "beats"}
    assert len(notes) == 1
    assert "@far, process" in notes[0]
