"""An object store as storage, on a real S3 server: folders that are whole or ignored, copies, locks, journals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from pipelines import storage as files
from tests.helpers.s3 import running_s3
from workflows.cli import main
from workflows.errors import UsageError, WorkflowError
from workflows.registry.models import resolve_model
from workflows.storage import lock as store_lease
from workflows.storage import remote as mirror
from workflows.storage.layout import open_storage
from workflows.storage.lock import Holder, StoreLease, lease
from workflows.storage.remote import (
    WHOLE,
    address,
    bring,
    cached,
    changed,
    is_whole,
    kept,
    mirrored,
    place,
    upload_folder,
)
from workflows.train.checkpoint import Checkpoint, ObjectStore

HOLD = """
import sys, time
from workflows.storage.lock import StoreLease
with StoreLease(sys.argv[1], "recipe tiny"):
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
    monkeypatch.setattr(store_lease, "BEAT", 0.2)
    monkeypatch.setattr(store_lease, "PATIENCE", 1.5)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    (root / "inside").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "inside" / "weights").write_bytes(bytes(1000))
    return root


def another_machine(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLMAMBA_CACHE", str(tmp_path / "another"))


def test_a_folder_comes_back_on_another_machine_and_is_fetched_once(uri, folder, tmp_path, monkeypatch):
    where = files.join(uri, "runs", "x")
    upload_folder(folder, where)
    another_machine(tmp_path, monkeypatch)
    copy = bring(where)
    assert copy == cached(where)
    assert sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()) == [
        "config.json",
        "inside/weights",
    ]
    (copy / "config.json").write_text("changed here")
    assert bring(where) == copy
    assert (copy / "config.json").read_text() == "changed here"  # that of the last upload: not fetched again
    assert changed(copy)
    upload_folder(folder, where)
    assert bring(where).joinpath("config.json").read_text() == "{}"
    assert not changed(copy)


def test_a_folder_without_its_mark_or_with_a_short_file_is_not_brought(uri, folder, tmp_path, monkeypatch):
    where = files.join(uri, "x")
    upload_folder(folder, where)
    another_machine(tmp_path, monkeypatch)
    files.write_atomic(files.join(where, "inside", "weights"), bytes(999))
    with pytest.raises(OSError, match="has 999 bytes, not the 1000 that were written"):
        bring(where)
    assert not cached(where).exists()
    files.delete(files.join(where, WHOLE))
    assert not is_whole(where)
    with pytest.raises(FileNotFoundError, match=r"not whole: it has no complete\.json"):
        bring(where)


def test_work_on_a_folder_goes_to_the_store_and_on_from_there(uri, tmp_path, monkeypatch):
    folder = open_storage(uri, remote=True) / "runs" / "x"
    with kept(folder):
        folder.mkdir(parents=True)
        (folder / "one").write_text("1")
    another_machine(tmp_path, monkeypatch)
    folder = open_storage(uri, remote=True) / "runs" / "x"
    with kept(folder):
        assert (folder / "one").read_text() == "1"
    upload = files.read_bytes(files.join(place(folder), WHOLE))
    with kept(folder):
        (folder / "two").write_text("2")
    assert files.read_bytes(files.join(place(folder), WHOLE)) != upload
    upload = files.read_bytes(files.join(place(folder), WHOLE))
    with kept(folder):
        pass
    assert files.read_bytes(files.join(place(folder), WHOLE)) == upload  # nothing was done, so nothing is sent
    with kept(tmp_path / "local"):
        assert not (tmp_path / "local").exists()


def test_a_mark_cannot_name_files_outside_of_its_folder(uri):
    where = files.join(uri, "x")
    files.write_atomic(files.join(where, WHOLE), json.dumps({"files": {"../../stray": 1}}).encode())
    with pytest.raises(OSError, match="names a file outside of it"):
        bring(where)


def test_a_path_leads_to_its_place_and_a_password_is_not_shown(s3, uri):
    base, query = uri.split("?")
    with_password = base.replace("s3://", "s3://test:test@") + "?" + query
    folder = open_storage(with_password, remote=True)
    assert place(folder / "runs" / "x") == f"{with_password.split('?')[0]}/runs/x?{query}"
    assert address(folder / "runs" / "x") == f"{base}/runs/x?{query}"
    assert folder == open_storage(uri, remote=True)  # the copies are the same, whoever asks
    assert place("/elsewhere") == address("/elsewhere") == "/elsewhere"
    assert s3.names(base.rpartition("/")[2]) == []  # what tried whether it can be written is gone


def test_storage_that_cannot_hold_a_workflow_is_refused_before_work(s3, uri, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    nowhere = s3.uri().replace("//bucket/", "//no-such-bucket/x")
    with pytest.raises(UsageError, match=r"--storage s3://no-such-bucket/x.*: cannot write there"):
        open_storage(nowhere, remote=True)
    assert main(["train", "quickstart", "--storage", uri]) == 2
    assert "an object store cannot hold MLflow's database; name an MLflow server" in capsys.readouterr().err
    assert main(["models", "list", "--storage", uri]) == 2
    assert "this command wants a folder for its own files" in capsys.readouterr().err


def test_a_model_is_named_by_its_uri(uri, folder):
    upload_folder(folder, files.join(uri, "stages", "full"))
    assert resolve_model(files.join(uri, "stages", "full"), folder).folder.joinpath("config.json").exists()
    with pytest.raises(WorkflowError, match=r"is not a model folder that can be read: .* not whole"):
        resolve_model(files.join(uri, "stages", "other"), folder)


def test_one_holds_the_lock_and_it_goes_with_the_block(s3, uri, quick):
    open_storage(uri, remote=True)
    path = cached(uri) / "runs" / "x" / "lock.json"
    with lease(path, "recipe tiny"):
        assert len(files.list_names(place(path))) == 1
        with pytest.raises(WorkflowError, match=rf"recipe tiny is under way already \(.*process {os.getpid()}"):
            lease(path, "recipe tiny").__enter__()
    assert files.list_names(place(path)) == []


def test_of_many_that_come_at_once_one_gets_it_at_a_time(uri, quick):
    inside, most, done, start = 0, 0, [], threading.Barrier(4)

    def work():
        nonlocal inside, most
        start.wait()
        with StoreLease(uri, "recipe tiny", wait=True):
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
    with pytest.raises(WorkflowError, match="under way already"), StoreLease(uri, "recipe tiny"):
        pass
    process.kill()
    process.communicate()
    assert len(files.list_names(uri)) == 1
    with StoreLease(uri, "recipe tiny"):
        assert len(files.list_names(uri)) == 1


def claim(uri: str, beat: int, held: bool = True) -> None:
    content = {"beat": beat, "held": held, **asdict(Holder("recipe tiny", token="far", machine="far", host="far"))}
    files.write_atomic(files.join(uri, "far.json"), json.dumps(content).encode())


def test_a_holder_on_another_machine_counts_while_its_number_grows(uri, quick):
    claim(uri, 1)
    over = threading.Event()

    def live():
        beat = 1
        while not over.wait(0.2):
            beat += 1
            claim(uri, beat)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(WorkflowError, match="@far, process"), StoreLease(uri, "recipe tiny"):
            pass
    finally:
        over.set()
        thread.join()
    notes = []
    with StoreLease(uri, "recipe tiny", notes.append):
        assert "far.json" not in files.list_names(uri)
    assert "looking whether it still runs" in notes[0]


def test_a_holder_that_was_taken_over_stops(uri, quick):
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        holder = StoreLease(uri, "recipe tiny").__enter__()
        claim(uri, 1)
        assert stopped.wait(10)
        with pytest.raises(WorkflowError, match="took over"):
            holder.__exit__(None, None, None)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_journal_goes_to_the_store_while_it_grows_and_comes_back(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "_SECONDS", 0.1)
    run = open_storage(uri, remote=True) / "runs" / "x"
    run.mkdir(parents=True)
    there = place(run / "log")
    with mirrored(run, ("log",), print):
        (run / "log").write_text("one\n")
        deadline = time.monotonic() + 10
        while not files.exists(there) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert files.read_bytes(there) == b"one\n"
        (run / "log").write_text("one\ntwo\n")
    assert files.read_bytes(there) == b"one\ntwo\n"
    (run / "log").write_text("one\ntwo\nthree\n")  # killed before it was sent
    with mirrored(run, ("log",), print):
        assert (run / "log").read_text() == "one\ntwo\nthree\n"
    files.write_atomic(there, b"one\ntwo\nfour\n")  # another machine went on
    with mirrored(run, ("log",), print):
        assert (run / "log").read_text() == "one\ntwo\nfour\n"


def write(store: ObjectStore, step: int, attempt: str = "a", keep: int = 9, workers: int = 2) -> None:
    staging = store.staging(step, attempt)
    staging.mkdir(parents=True)
    for rank in range(workers):
        names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] + (["mp_rank_00_model_states.pt"] * (rank == 0))
        for name in names:
            (staging / name).write_bytes(b"state" * step)
        store.hand_over(staging, rank, names)
    assert store.all_listed(staging, workers)
    store.complete(staging, Checkpoint(staging, step, workers, 2, "model", 1.5, {}), keep)


def test_checkpoints_are_whole_or_ignored_and_kept_to_a_number(s3, uri):
    store = ObjectStore(uri)
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
    store.hand_over(staging, 0, ["x.pt"])
    assert not store.all_listed(staging, 2)
    store.sweep()
    assert {name.split("/")[1] for name in s3.names(store.newest().among.split("/")[3])} == {"step-00000020.a"}


def test_a_rank_fetches_its_own_files_or_all(uri):
    store = ObjectStore(uri)
    write(store, 10)
    mine = store.bring(store.newest(), 1, everything=False)
    assert sorted(file.name for file in mine.folder.glob("*.pt")) == [
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ]
    assert len(list(store.bring(store.newest(), 1, everything=True).folder.glob("*.pt"))) == 3
    store.release(mine)
    assert not mine.folder.exists()
