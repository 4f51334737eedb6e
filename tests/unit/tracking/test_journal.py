"""The journal between a workflow and MLflow: nothing lost, nothing twice, nobody waits for the server."""

import json
import subprocess
import sys
import threading
import time

import pytest

from workflows.tracking import journal as journals
from workflows.tracking.journal import Journal, Refused


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(journals, "_PAUSES", (0.05, 0.2))


class Server:
    """Takes entries, or refuses to answer."""

    def __init__(self):
        self.got, self.away, self.block = [], False, threading.Event()
        self.block.set()

    def __call__(self, entries: list[dict]) -> None:
        self.block.wait()
        if self.away:
            raise ConnectionError("nobody there\nsecond line")
        if any(entry.get("bad") for entry in entries):
            raise Refused("no such name")
        self.got += entries


def test_entries_arrive_in_order_and_are_marked_as_sent(tmp_path):
    server, notes = Server(), []
    journal = Journal(tmp_path, "run", server, notes.append)
    for i in range(250):
        journal.add({"step": i})
    assert journal.close(10)
    assert [entry["step"] for entry in server.got] == list(range(250))
    assert json.loads((tmp_path / "tracking-sent.json").read_text()) == {"run_id": "run", "entries": 250}
    assert notes == []


def test_a_slow_server_keeps_nobody_waiting(tmp_path):
    server = Server()
    server.block.clear()
    journal = Journal(tmp_path, "run", server, print)
    start = time.monotonic()
    for i in range(1000):
        journal.add({"step": i})
    assert time.monotonic() - start < 5  # no call waits for the server, which never answers here
    assert not journal.drain(0.1)
    server.block.set()
    assert journal.close(10)
    assert len(server.got) == 1000


def test_a_server_that_goes_away_is_told_once_and_gets_everything_later(tmp_path):
    server, notes = Server(), []
    server.away = True
    journal = Journal(tmp_path, "run", server, notes.append)
    for i in range(10):
        journal.add({"step": i})
    time.sleep(0.6)
    assert len(notes) == 1
    assert "MLflow does not answer (ConnectionError: nobody there): training goes on" in notes[0]
    server.away = False
    assert journal.close(10)
    assert [entry["step"] for entry in server.got] == list(range(10))
    assert notes[1:] == ["MLflow answers again"]


def test_what_a_killed_process_did_not_send_the_next_one_sends(tmp_path):
    server = Server()
    server.away = True
    first = Journal(tmp_path, "run", server, lambda text: None)
    first.add({"step": 1})
    first.add({"step": 2})
    assert not first.close(0.1)
    with (tmp_path / "tracking.jsonl").open("a") as file:
        file.write('{"step": 3, "cut o')  # the kill came while it wrote
    server.away = False
    second = Journal(tmp_path, "run", server, print)
    second.add({"step": 4})
    assert second.close(10)
    assert [entry["step"] for entry in server.got] == [1, 2, 4]
    third = Journal(tmp_path, "run", server, print)
    assert third.close(10)
    assert len(server.got) == 3
    assert [entry["step"] for entry in third.entries] == [1, 2, 4]


def test_another_run_gets_all_of_it(tmp_path):
    server = Server()
    for run in ("one", "another"):
        journal = Journal(tmp_path, run, server, print)
        if run == "one":
            journal.add({"step": 1})
        assert journal.close(10)
    assert server.got == [{"step": 1}, {"step": 1}]


def test_what_the_server_will_never_take_is_left_out_and_told(tmp_path):
    server, notes = Server(), []
    journal = Journal(tmp_path, "run", server, notes.append)
    server.block.clear()
    for entry in ({"step": 1}, {"step": 2}, {"bad": True}, {"step": 3}):
        journal.add(entry)
    server.block.set()
    assert journal.close(10)
    assert server.got == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert notes == ["MLflow refuses an entry, which is left out: no such name"]


def test_a_full_disk_does_not_stop_training(tmp_path):
    server, notes = Server(), []
    journal = Journal(tmp_path, "run", server, notes.append)
    (tmp_path / "tracking.jsonl").mkdir()  # nothing can be written there
    journal.add({"step": 1})
    assert journal.close(10)
    assert server.got == [{"step": 1}]
    assert "cannot write" in notes[0]


FULL_FOR_A_MOMENT = """
import resource, signal, sys
from pathlib import Path
from workflows.tracking.journal import Journal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, most = Path(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
journal = Journal(folder, "run", lambda batch: None, print)
for step in range(50):
    if step == 10:  # no file may grow past what the journal holds and a little more, so that a line is cut
        size = (folder / "tracking.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, most))
    if step == 30:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    journal.add({"step": step, "value": "x" * 20})
assert journal.close(10)
"""


def test_a_disk_that_is_full_for_a_moment_costs_no_entry(tmp_path):
    """The system writes the part of a line for which there is room. It used to stay, and no later run could read on."""
    done = subprocess.run([sys.executable, "-c", FULL_FOR_A_MOMENT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot write") == 1
    journal = Journal(tmp_path, "run", Server(), print)
    assert [entry["step"] for entry in journal.entries] == list(range(50))
    assert journal.close(10)


def test_lines_that_cannot_be_read_are_left_out_with_a_note(tmp_path):
    server, notes = Server(), []
    lines = ['{"step": 1}', '{"step": 2', "5", "", "\x00\x00", "null", '{"step": 3}', '{"step": 4']
    (tmp_path / "tracking.jsonl").write_text("\n".join(lines))
    (tmp_path / "tracking-sent.json").write_text('{"run_id": "run", "entries": 7}')
    journal = Journal(tmp_path, "run", server, notes.append)
    assert journal.close(10)
    assert server.got == [{"step": 3}]  # what the other program counted as sent is not known behind the first of them
    assert "4 lines cannot be read and are left out (line 2, 3, 5, 6)" in notes[0]
    journal = Journal(tmp_path, "other", server, notes.append)
    journal.add({"step": 5})
    assert journal.close(10)
    assert server.got[1:] == [{"step": 1}, {"step": 3}, {"step": 5}]
