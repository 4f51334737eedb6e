"""An object store as storage, on a real S3 server: folders that are whole or ignored, copies, locks, journals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from pipelines import storage as files
from tests.helpers.s3 import running_s3
from workflows.cli import main
from workflows.errors import UsageError, WorkflowError
from workflows.registry.models import resolve_model
from workflows.storage import claims
from workflows.storage.claims import Holder
from workflows.storage.folder import WHOLE, Folder
from workflows.storage.layout import open_storage
from workflows.storage.lock import lock
from workflows.tracking import journal
from workflows.tracking.journal import mirrored
from workflows.train.checkpoint import Checkpoint, CheckpointStore

HOLD = """
import sys, time
from workflows.storage.lock import lock
with lock(sys.argv[1], "recipe tiny"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def s3():
    with running_s3() as server:
        yield server


@pytest.fixture
def uri(s3, request, tmp_path, monkeypatch) -> str:
    """A folder of the test's own in the store, and an empty cache."""
    monkeypatch.setenv("MLMAMBA_CACHE", str(tmp_path / "cache"))
    return s3.uri(request.node.name.split("[")[0])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.2)
    monkeypatch.setattr(claims, "PATIENCE", 1.5)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    (root / "inside").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "inside" / "weights").write_bytes(bytes(1000))
    return root


def put(folder: Path, there: Folder) -> None:
    """Publish a folder of this machine in the store."""
    with there.writing() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)


def another_machine(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLMAMBA_CACHE", str(tmp_path / "another"))


def test_a_folder_comes_back_on_another_machine_and_is_fetched_once(uri, folder, tmp_path, monkeypatch):
    there = Folder(uri) / "runs" / "x"
    put(folder, there)
    another_machine(tmp_path, monkeypatch)
    copy = there.fetch()
    assert copy == there.local
    assert sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()) == [
        "config.json",
        "inside/weights",
    ]
    (copy / "config.json").write_text("changed here")
    assert there.fetch() == copy
    assert (copy / "config.json").read_text() == "changed here"  # that of the last transfer: not fetched again
    assert there.changed()
    put(folder, there)
    assert there.fetch().joinpath("config.json").read_text() == "{}"
    assert not there.changed()


def test_a_folder_without_its_mark_or_with_a_short_file_is_not_fetched(uri, folder, tmp_path, monkeypatch):
    there = Folder(uri) / "x"
    put(folder, there)
    another_machine(tmp_path, monkeypatch)
    there.write("inside/weights", bytes(999))
    with pytest.raises(OSError, match="has 999 bytes, not the 1000 that were written"):
        there.fetch()
    assert not there.local.exists()
    files.delete((there / WHOLE).uri)
    assert not there.whole()
    with pytest.raises(FileNotFoundError, match=r"not whole: it has no complete\.json"):
        there.fetch()


def test_work_on_a_folder_goes_to_the_store_and_on_from_there(uri, tmp_path, monkeypatch):
    there = open_storage(uri) / "runs" / "x"
    with there.editing() as folder:
        folder.mkdir(parents=True)
        (folder / "one").write_text("1")
    another_machine(tmp_path, monkeypatch)
    with there.editing() as folder:
        assert (folder / "one").read_text() == "1"
    upload = there.read(WHOLE)
    with there.editing() as folder:
        (folder / "two").write_text("2")
    assert there.read(WHOLE) != upload
    upload = there.read(WHOLE)
    with there.editing():
        pass
    assert there.read(WHOLE) == upload  # nothing was done, so nothing is sent


def test_a_mark_cannot_name_files_outside_of_its_folder(uri):
    there = Folder(uri) / "x"
    there.write(WHOLE, json.dumps({"files": {"../../stray": 1}}))
    with pytest.raises(OSError, match="names a file outside of it"):
        there.fetch()


def test_a_child_keeps_the_query_and_a_password_is_not_shown(s3, uri):
    base, query = uri.split("?")
    with_password = base.replace("s3://", "s3://test:test@") + "?" + query
    there = open_storage(with_password) / "runs" / "x"
    assert there.uri == f"{with_password.split('?')[0]}/runs/x?{query}"
    assert there.shown == f"{base}/runs/x?{query}"
    assert there.local == (open_storage(uri) / "runs" / "x").local  # the copies are the same, whoever asks
    assert s3.names(base.rpartition("/")[2]) == []  # what tried whether it can be written is gone


def test_storage_that_cannot_hold_a_workflow_is_refused_before_work(s3, uri, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    nowhere = s3.uri().replace("//bucket/", "//no-such-bucket/x")
    with pytest.raises(UsageError, match=r"--storage s3://no-such-bucket/x.*: cannot write there"):
        open_storage(nowhere)
    assert main(["train", "quickstart", "--storage", uri]) == 2
    assert "an object store cannot hold MLflow's database; name an MLflow server" in capsys.readouterr().err
    assert main(["models", "list", "--storage", uri]) == 2
    assert "this command wants a folder for its own files" in capsys.readouterr().err


def test_a_model_is_named_by_its_uri(uri, folder):
    put(folder, Folder(uri) / "stages" / "full")
    assert resolve_model(files.join(uri, "stages", "full"), folder).folder.joinpath("config.json").exists()
    with pytest.raises(WorkflowError, match=r"is not a model folder that can be read: .* not whole"):
        resolve_model(files.join(uri, "stages", "other"), folder)


def test_one_holds_the_lock_and_it_goes_with_the_block(uri, quick):
    where = files.join(uri, "runs", "x", "lock.json")
    with lock(where, "recipe tiny"):
        assert len(files.list_names(where)) == 1
        with pytest.raises(WorkflowError, match=rf"recipe tiny is under way already \(.*process {os.getpid()}"):
            lock(where, "recipe tiny").__enter__()
    assert files.list_names(where) == []


def test_of_many_that_come_at_once_one_gets_it_at_a_time(uri, quick):
    inside, most, done, start = 0, 0, [], threading.Barrier(4)

    def work():
        nonlocal inside, most
        start.wait()
        with lock(uri, "recipe tiny", wait=True):
            inside += 1
            most = max(most, inside)
            time.sleep(0.5)
            inside -= 1
            done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, len(done)) == (1, 4)
    assert files.list_names(uri) == []


def test_a_killed_holder_keeps_nothing(uri, quick):
    process = subprocess.Popen([sys.executable, "-c", HOLD, uri], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(WorkflowError, match="under way already"), lock(uri, "recipe tiny"):
        pass
    process.kill()
    process.communicate()
    assert len(files.list_names(uri)) == 1
    with lock(uri, "recipe tiny"):
        assert len(files.list_names(uri)) == 1


def write_claim(uri: str, beat: int, held: bool = True) -> None:
    content = {"beat": beat, "held": held, **asdict(Holder("recipe tiny", token="far", machine="far", host="far"))}
    files.write_atomic(files.join(uri, "far.json"), json.dumps(content).encode())


def test_a_holder_on_another_machine_counts_while_its_number_grows(uri, quick):
    write_claim(uri, 1)
    over = threading.Event()

    def live():
        beat = 1
        while not over.wait(0.2):
            beat += 1
            write_claim(uri, beat)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(WorkflowError, match="@far, process"), lock(uri, "recipe tiny"):
            pass
    finally:
        over.set()
        thread.join()
    notes = []
    with lock(uri, "recipe tiny", notes.append):
        assert "far.json" not in files.list_names(uri)
    assert "looking whether it still runs" in notes[0]


def test_a_holder_that_was_taken_over_stops(uri, quick):
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        holder = lock(uri, "recipe tiny")
        holder.__enter__()
        write_claim(uri, 1)
        assert stopped.wait(10)
        with pytest.raises(WorkflowError, match="took over"):
            holder.__exit__(None, None, None)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_journal_goes_to_the_store_while_it_grows_and_comes_back(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_UPLOAD_SECONDS", 0.1)
    run = open_storage(uri) / "runs" / "x"
    run.local.mkdir(parents=True)
    here = run.local / "log"
    with mirrored(run, ("log",), print):
        here.write_text("one\n")
        deadline = time.monotonic() + 10
        while not (run / "log").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert run.read("log") == b"one\n"
        here.write_text("one\ntwo\n")
    assert run.read("log") == b"one\ntwo\n"
    here.write_text("one\ntwo\nthree\n")  # killed before it was sent
    with mirrored(run, ("log",), print):
        assert here.read_text() == "one\ntwo\nthree\n"
    run.write("log", "one\ntwo\nfour\n")  # another machine went on
    with mirrored(run, ("log",), print):
        assert here.read_text() == "one\ntwo\nfour\n"


def write(store: CheckpointStore, step: int, attempt: str = "a", keep: int = 9, workers: int = 2) -> None:
    staging = store.staging(step, attempt)
    staging.mkdir(parents=True)
    for rank in range(workers):
        names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] + (["mp_rank_00_model_states.pt"] * (rank == 0))
        for name in names:
            torch.save({"step": step}, staging / name)
        store.publish(staging, rank, names)
    assert store.all_listed(staging, workers)
    store.complete(staging, Checkpoint(staging, step, workers, 2, "model", 1.5, {}), keep)


def test_checkpoints_are_whole_or_ignored_and_kept_to_a_number(s3, uri):
    store = CheckpointStore(Folder(uri))
    assert store.newest() is None
    for step in (10, 20, 30):
        write(store, step, keep=2)
    assert {name.split("/")[1] for name in s3.names(store.newest().among.split("/")[3])} == {
        "step-00000020.a",
        "step-00000030.a",
    }
    assert store.newest().step == 30
    files.delete(files.join(uri, "step-00000030.a", "mp_rank_00_model_states.pt"))
    assert store.newest().step == 20
    staging = store.staging(40, "b")
    staging.mkdir(parents=True)
    (staging / "x.pt").write_bytes(b"x")
    store.publish(staging, 0, ["x.pt"])
    assert not store.all_listed(staging, 2)
    store.sweep()
    assert {name.split("/")[1] for name in s3.names(store.newest().among.split("/")[3])} == {"step-00000020.a"}


def test_a_rank_fetches_its_own_files_or_all(uri):
    store = CheckpointStore(Folder(uri))
    write(store, 10)
    mine = store.newest()
    store.fetch(mine, 1, everything=False)
    assert sorted(file.name for file in mine.folder.glob("*.pt")) == [
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ]
    store.fetch(mine, 1, everything=True)
    assert len(list(mine.folder.glob("*.pt"))) == 3
    store.release(mine)
    assert not mine.folder.exists()
